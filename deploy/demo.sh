#!/usr/bin/env bash
# The main job, on the embedded sample, offline: quantize, serve with the real vLLM, embed with the openai client, compare.
# usage: deploy/demo.sh [FOLDER]      works in FOLDER (default .demo), on a free port; ends the server that it started
set -euo pipefail

work=${1:-.demo}
mkdir -p "$work"
cd "$work"
export QEMBED_MODEL=sample HF_HUB_OFFLINE=1 OPENAI_API_KEY=none
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }

step qembed quantize --model sample
qembed quantize --force

step qembed serve --int4 --port "$port"
qembed serve --int4 --port "$port" --json > ready.json &
server=$!
trap 'kill -INT "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
until [ -s ready.json ]; do
  kill -0 "$server" 2>/dev/null || { wait "$server"; exit 1; }
  sleep 0.5
done
cat ready.json

step 'client.embeddings.create(model=…, input=[…], dimensions=128)      with the openai package'
python - "http://127.0.0.1:$port/v1" <<'PYTHON'
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1])
model = client.models.list().data[0].id
texts = ["a program that plays music", "audio player", "a library for reading PDF files"]
vectors = [item.embedding for item in client.embeddings.create(model=model, input=texts, dimensions=128).data]
for text, vector in zip(texts, vectors):
    similarity = sum(a * b for a, b in zip(vectors[0], vector))
    print(f"{similarity:6.3f}  {text}   [{vector[0]:+.4f} {vector[1]:+.4f} … {len(vector)} dimensions]")
PYTHON

step qembed eval --baseline fp16 --url "http://127.0.0.1:$port/v1"
qembed eval --baseline fp16 --url "http://127.0.0.1:$port/v1"

python - ready.json <<'PYTHON'
import json
import sys

ready = json.load(open(sys.argv[1]))
print(f"\nserved in {ready['dtype']} by the INT4 kernel {ready['kernel']!r}: {ready['kernel_reason']}")
PYTHON
