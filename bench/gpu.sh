#!/usr/bin/env bash
# What an NVIDIA GPU is measured with, in pieces of at most eight minutes (docs/benchmarks.md, "make bench-gpu").
#   gpu.sh [run] [PIECE…] [--device cpu] [--results DIR]   measure: quantize, serve, fidelity, together; or a rehearsal
#   gpu.sh merge [--results DIR]                           put sections that came back into RESULTS.md
#   gpu.sh pack WHEELS | sizes | rehearse DIR | receive    vLLM for a machine without a network, in parts
#   gpu.sh imports SITE                                    what vLLM imports there, tried here
# Variables:
#   PYTHON   a Python that has torch for CUDA [default: python3]; with --device cpu one that has vLLM for CPUs
#   LIMIT    seconds after which a run is ended; what it measured by then is stored [default: 480]
# With a network and without received parts, vLLM is installed into build/gpu/venv. Without a GPU nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
site=$PWD/build/gpu/site
verb=run
case ${1:-} in
  run | merge | pack | sizes | rehearse | receive | imports) verb=$1; shift ;;
esac

cpu=
case " $* " in *' --device cpu '* | *' --device=cpu '*) cpu=1 ;; esac
default=python3
if [ "$verb" != receive ] && [ -x .venv/bin/python ] && { [ -n "$cpu" ] || [ "$verb" != run ] || ! command -v nvidia-smi > /dev/null; }; then
  default=.venv/bin/python
fi
python=${PYTHON:-$default}
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1

case $verb in
  pack | sizes | rehearse | receive) exec "$python" bench/gpu_wheels.py "$verb" "$@" ;;
  imports) PYTHONPATH= exec "$python" bench/gpu_imports.py "$@" ;;
  merge) exec "$python" bench/gpu.py merge "$@" ;;
esac

if [ -z "$cpu" ]; then
  if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L > /dev/null 2>&1; then
    exec "$python" bench/gpu.py run "$@"
  fi
  case " $* " in
    *' serve '* | *' fidelity '* | *' together '*) needs_vllm=1 ;;
    *' quantize '*) needs_vllm= ;;
    *) needs_vllm=1 ;;
  esac
  if [ -n "$needs_vllm" ] && ! "$python" -c 'import vllm' 2> /dev/null; then
    if [ -e build/gpu/received ]; then
      echo "gpu.sh: parts of vLLM are missing; see: bash bench/gpu.sh receive" >&2
      exit 1
    fi
    test -x build/gpu/venv/bin/python || "$python" -m venv build/gpu/venv
    python=build/gpu/venv/bin/python
    "$python" -m pip install --quiet 'setuptools>=77' '.[gpu]' pytest
  fi
  "$python" -c 'from pathlib import Path; import sys; sys.path.insert(0, "bench"); import gpu_wheels; gpu_wheels.register(Path(sys.argv[1]))' "$site"
fi
exec timeout --signal=INT --kill-after=20 "${LIMIT:-480}" "$python" bench/gpu.py run "$@"
