"""vLLM's answer → the client's: scores, ranked with their documents, or in the request's order. Pure functions."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from qembed.serve.gate.rerank_request import Pairs

RESULT_BYTES = 100
CHARACTER_BYTES = 4


def size(batch: Pairs, _dimensions: Sequence[int]) -> int:
    """About the bytes of the answer for `batch`, with its documents if the request wants them."""
    return RESULT_BYTES * batch.count + CHARACTER_BYTES * sum(map(len, batch.originals))


def write(answer: dict[str, Any], batch: Pairs) -> bytes:
    """The client's answer as JSON: results from the highest score down, at most `top_n`, or all scores in order."""
    import numpy as np

    scores = [float(np.frombuffer(base64.b64decode(item["embedding"]), np.float32)[-1]) for item in answer["data"]]
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), answer["usage"]["prompt_tokens"])
    frame = {"id": answer.get("id", ""), "model": answer["model"], "usage": usage}
    if batch.is_score:
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        content = {**frame, "object": "list", "created": answer.get("created", 0), "data": data}
    else:
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: batch.top_n]
        content = {**frame, "results": [_result(batch, index, scores[index]) for index in order]}
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def _result(batch: Pairs, index: int, score: float) -> dict[str, Any]:
    document = {"document": {"text": batch.originals[index]}} if batch.originals else {}
    return {"index": index, "relevance_score": score, **document}
