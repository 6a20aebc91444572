#!/usr/bin/env bash
# What `make bench-gpu` runs: finds or makes an environment with vLLM for CUDA, and runs bench/gpu.py in it.
#   PYTHON   a Python that has torch for CUDA [default: python3]
#   WHEELS   a folder of wheels for a machine without network: deps/*.whl and vllm/part-*, as ../shared/gpu/pack.sh makes it
# Without a GPU nothing is installed: it says that it was skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=build/gpu/site

if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L > /dev/null 2>&1; then
  exec .venv/bin/python bench/gpu.py
fi

mkdir -p "$site"
export PYTHONPATH="$PWD/$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
if ! "$python" -c 'import vllm' 2> /dev/null; then
  if [ -n "${WHEELS:-}" ]; then
    joined=build/gpu/wheel
    mkdir -p "$joined"
    cat "$WHEELS"/vllm/part-* > "$joined/$(cat "$WHEELS/vllm/name")"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/deps/*.whl "$joined"/vllm-*.whl
  else
    test -x build/gpu/venv/bin/python || "$python" -m venv build/gpu/venv
    python=build/gpu/venv/bin/python
    "$python" -m pip install --quiet 'setuptools>=77' '.[gpu]'
  fi
fi
# setuptools may be older than pyproject.toml asks for where there is no network; the packages are the same.
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade --target "$site" .
exec "$python" bench/gpu.py "$@"
