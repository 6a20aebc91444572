#!/usr/bin/env bash
# Prints a Secret with two new API keys, one for clients and one for Prometheus, for `kubectl apply -f -`.
# usage: deploy/kubernetes/make-secret.sh | kubectl apply --namespace qembed --filename -
# To change keys: docs/deploy.md, "Change keys".
set -euo pipefail
key() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
client=$(key)
metrics=$(key)
kubectl create secret generic qembed-keys --dry-run=client --output yaml \
  --from-file=keys=/dev/fd/3 --from-file=metrics=/dev/fd/4 3< <(printf '%s\n' "$client" "$metrics") 4< <(printf %s "$metrics")
