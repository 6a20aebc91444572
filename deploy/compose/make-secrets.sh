#!/usr/bin/env bash
# Makes what compose.yaml hands to its containers as secrets, where it is not there yet.
# usage: sudo ./make-secrets.sh [FOLDER]      default: secrets, beside this file
# The key is qembed's (uid 10001) and Prometheus's (gid 65534) to read, Grafana's password Grafana's (uid 472). One key, for
# Prometheus sends the whole file.
set -euo pipefail
folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"
for secret in keys:10001:65534:440 grafana:472:0:400; do
  IFS=: read -r name owner group mode <<< "$secret"
  if [ ! -e "$folder/$name" ]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$folder/$name.new"
    chown "$owner:$group" "$folder/$name.new"
    chmod "$mode" "$folder/$name.new"
    mv "$folder/$name.new" "$folder/$name"
    echo "$folder/$name"
  fi
done
