"""vLLM's answer → the client's: vectors checked for NaN and infinity, and in the requested encoding. Pure functions."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from qembed.serve.gate.errors import Refused
from qembed.serve.gate.request import Batch
from qembed.vllm.gate_rules import NONFINITE

NUMBER_BYTES = {"float": 24, "base64": 6}
"""About the bytes of one number of a vector in an answer, by encoding."""


def read(raw: bytes) -> tuple[dict[str, Any], list[int]]:
    """vLLM's answer `raw`, with float32 vectors in base64, and the indices in its "data" of vectors that are not finite."""
    import numpy as np

    answer = json.loads(raw)
    nonfinite = []
    for index, item in enumerate(answer["data"]):
        if "embedding" not in item:
            item["embedding"] = item.pop("data")  # as /pooling has it
        vector = np.frombuffer(base64.b64decode(item["embedding"]), dtype=np.float32)
        if not vector.size or not np.isfinite(vector).all():
            nonfinite.append(index)
    return answer, nonfinite


def replace(answer: dict[str, Any], indices: Sequence[int], recomputed: dict[str, Any], nonfinite: Sequence[int]) -> list[int]:
    """Put the vectors of `recomputed` at `indices` of `answer`.

    Those at the positions `nonfinite` of `recomputed` are left out; returns their indices in `answer`.
    """
    for position, index in enumerate(indices):
        if position not in nonfinite:
            answer["data"][index]["embedding"] = recomputed["data"][position]["embedding"]
    return [indices[position] for position in nonfinite]


def write(answer: dict[str, Any], batch: Batch) -> bytes:
    """The client's answer as JSON, with vectors in the encoding of `batch`: "base64", as in `answer`, or "float".

    Each vector is a call of its own, so that a thread that writes thousands lets others run in between.
    """
    import numpy as np

    rows = []
    for item in answer["data"]:
        if batch.encoding == "float":
            vector = np.frombuffer(base64.b64decode(item["embedding"]), dtype=np.float32).tolist()
            item = {**item, "embedding": vector}
        rows.append(json.dumps(item, separators=(",", ":")))
    frame = json.dumps({**answer, "data": []}, separators=(",", ":"))
    before, _, after = frame.partition('"data":[]')
    return "".join((before, '"data":[', ",".join(rows), "]", after)).encode()


def size(batch: Batch, dimensions: Sequence[int]) -> int:
    """About the bytes of the answer for `batch`, if a vector has the largest of `dimensions` or what the request asks for."""
    length = batch.body.get("dimensions") or max(dimensions, default=0)
    return bytes_of(len(batch.inputs), length, batch.encoding)


def bytes_of(vectors: int, length: int, encoding: str) -> int:
    """About the bytes of an answer with `vectors` vectors of `length` numbers."""
    return vectors * length * NUMBER_BYTES[encoding]


def refused(batch: Batch, index: int) -> Refused:
    """Status 500 for the text or pair at `index`, whose vector or score is NaN or infinite even when recomputed."""
    result = "vector" if type(batch) is Batch else "score"
    name = batch.name(index)
    return Refused(500, f"the {result} of {name} {NONFINITE}; it is not passed on", "nonfinite", name.partition("[")[0])


def join(parts: Sequence[tuple[Sequence[int], dict[str, Any]]]) -> dict[str, Any]:
    """One answer of vLLM's from several: `parts` are the indices of each one's texts in the whole request, and the answer."""
    if len(parts) == 1:
        return parts[0][1]
    tokens = sum(answer["usage"]["prompt_tokens"] for _, answer in parts)
    rows = {
        index: {**item, "index": index}
        for indices, answer in parts
        for index, item in zip(indices, answer["data"], strict=True)
    }
    whole = parts[0][1]
    usage = {**whole["usage"], "prompt_tokens": tokens, "total_tokens": tokens}
    return {**whole, "data": [rows[index] for index in sorted(rows)], "usage": usage}
