"""Answers to clients."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from qembed.serve.gate import request, response
from qembed.vllm.gate_rules import Rules

RULES = Rules(folder="", max_model_len=10, dimensions=[256, 1024])


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("dimensions", [None, 256])
def test_the_reserved_size_is_close_to_the_answers_size(encoding: str, dimensions: int | None) -> None:
    body = {"input": ["a", "b", "c"], "encoding_format": encoding, "dimensions": dimensions}
    batch = request.read(json.dumps(body).encode(), RULES, len)
    vectors = np.random.default_rng(0).normal(size=(3, dimensions or 1024)).astype("f4")
    data = [{"index": index, "embedding": base64.b64encode(row.tobytes()).decode()} for index, row in enumerate(vectors)]
    written = response.write({"object": "list", "data": data}, batch)
    assert 0.75 < len(written) / response.size(batch, RULES.dimensions) < 1.1
