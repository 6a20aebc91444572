#!/usr/bin/env bash
# Creates the secrets that compose.yaml mounts; existing ones stay as they are.
# usage: sudo ./make-secrets.sh [FOLDER]      default: secrets, beside this file
#   keys      the API keys that qembed accepts, one per line: the clients' first, Prometheus's last (readable by uid 10001)
#   metrics   the key that Prometheus sends, alone in its file (readable by uid 65534)
#   grafana   the password of Grafana's user admin (readable by uid 472)
set -euo pipefail
folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"

key() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# place NAME UID: what comes on stdin, atomically
place() {
  cat > "$folder/$1.new"
  chown "$2:0" "$folder/$1.new"
  chmod 400 "$folder/$1.new"
  mv "$folder/$1.new" "$folder/$1"
  echo "$folder/$1"
}

if [ ! -e "$folder/metrics" ]; then
  key | place metrics 65534
fi
metrics=$(cat "$folder/metrics")
if [ ! -e "$folder/keys" ]; then
  printf '%s\n' "$(key)" "$metrics" | place keys 10001
elif ! grep -qF -- "$metrics" "$folder/keys"; then
  { awk 1 "$folder/keys"; printf '%s\n' "$metrics"; } | place keys 10001
fi
if [ ! -e "$folder/grafana" ]; then
  key | place grafana 472
fi
