"""vLLM's answer → the client's: vectors checked for NaN and infinity, and in the requested encoding. Pure functions."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from qembed.serve.gate.errors import Refused


def read(raw: bytes) -> tuple[dict[str, Any], list[int]]:
    """vLLM's answer `raw`, with float32 vectors in base64, and the indices in its "data" of vectors that are not finite."""
    import numpy as np

    answer = json.loads(raw)
    nonfinite = []
    for index, item in enumerate(answer["data"]):
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


def write(answer: dict[str, Any], encoding: str) -> bytes:
    """The client's answer as JSON, with vectors in `encoding`: "base64", as in `answer`, or "float"."""
    import numpy as np

    if encoding == "float":
        for item in answer["data"]:
            item["embedding"] = np.frombuffer(base64.b64decode(item["embedding"]), dtype=np.float32).tolist()
    return json.dumps(answer, separators=(",", ":")).encode()


def refused(index: int) -> Refused:
    """Status 500 for the text at `index`, whose vector has NaN or infinity even when recomputed."""
    return Refused(500, f"the vector of input[{index}] holds NaN or infinity; it is not passed on", "nonfinite", "input")


def join(parts: Sequence[tuple[Sequence[int], bytes]]) -> bytes:
    """One answer of vLLM's from several: `parts` are the indices of each one's texts in the whole request, and the answer."""
    whole: dict[str, Any] = {}
    rows: dict[int, dict[str, Any]] = {}
    tokens = 0
    for indices, raw in parts:
        answer = json.loads(raw)
        whole = whole or answer
        tokens += answer["usage"]["prompt_tokens"]
        rows |= {index: {**item, "index": index} for index, item in zip(indices, answer["data"], strict=True)}
    usage = {**whole["usage"], "prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps({**whole, "data": [rows[index] for index in sorted(rows)], "usage": usage}).encode()
