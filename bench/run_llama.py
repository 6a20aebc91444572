"""Embed the bench's requests with llama.cpp; numbers as JSON on stdout: `python run_llama.py MODEL.gguf LOADS.json THREADS`.

Runs in the environment that `make bench-serve` creates for llama.cpp. LOADS.json has token ids: {name: [[[id, …], …], …]},
requests of texts. There is no server and no tokenizer: llama.cpp itself is measured. With `--turns` as last argument it embeds
the request named by each line [name, number] on stdin, and answers with a line.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np
import serve_load

CONTEXT, SEQUENCES = 2336, 8


class Model:
    """A model and a context for embeddings of last tokens."""

    def __init__(self, file: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = CONTEXT, 1024, 1024, SEQUENCES
        settings.n_threads = settings.n_threads_batch = threads
        settings.embeddings, settings.kv_unified = True, True
        settings.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_LAST
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch = llama_cpp.llama_batch_init(1024, 0, 1)
        self._width = llama_cpp.llama_model_n_embd(self._model)

    def embed(self, texts: list[list[int]]) -> list[np.ndarray]:
        """The unit vectors of `texts`, token ids, all in one batch."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, False)
        batch, at = self._batch, 0
        for number, ids in enumerate(texts):
            for position, token in enumerate(ids):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
                batch.seq_id[at][0], batch.logits[at] = number, True
                at += 1
        batch.n_tokens = at
        if llama_cpp.llama_decode(self._context, batch):
            sys.exit("llama_decode failed")
        vectors = []
        for number in range(len(texts)):
            pointer = llama_cpp.llama_get_embeddings_seq(self._context, number)
            vector = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._width,)).copy()
            vectors.append(vector / np.linalg.norm(vector))
        return vectors


def main() -> None:
    """Load the model, embed each load, print its numbers."""
    start = time.perf_counter()
    model = Model(Path(sys.argv[1]), int(sys.argv[3]))
    requests = json.loads(Path(sys.argv[2]).read_text())
    if "--turns" in sys.argv:
        for line in sys.stdin:
            name, number = json.loads(line)
            model.embed(requests[name][number])
            print("done", flush=True)
        return
    vectors = {name: [vector.tolist() for vector in model.embed(batches[0])] for name, batches in requests.items()}
    first = time.perf_counter() - start
    pid = os.getpid()
    rates: dict[str, float] = {}
    numbers = {"first_seconds": first, "loaded_bytes": serve_load.shared_memory([pid]), "vectors": vectors, "rates": rates}
    with serve_load.Peak(lambda: serve_load.shared_memory([pid])) as peak:
        for name, batches in requests.items():
            load = serve_load.Load(name, name, len(batches[0][0]), batches)
            rates[name] = serve_load.rate(load, model.embed)
    numbers["busy_bytes"] = peak.bytes
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
