"""Texts beyond the model's limit in parts: which parts, their errors, and the vector of the whole text."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qembed.serve.gate import long_texts
from qembed.serve.gate.errors import Refused
from qembed.serve.gate.request import Batch, read
from qembed.vllm.gate_rules import Rules

PROMPT = "Instruct: search\nQuery: "
RULES = Rules(
    folder="", max_model_len=40, dimensions=[4], prompts={"query": PROMPT, "document": ""}, max_batch=8, max_body=10_000
)
LONG = " ".join(f"w{number}" for number in range(100))


def words(text: str) -> int:
    """Words, and one token that is appended."""
    return len(text.split()) + 1


def ask(rules: Rules = RULES, **body: Any) -> Batch:
    return read(json.dumps(body).encode(), rules, words)


def refused(rules: Rules = RULES, **body: Any) -> str:
    with pytest.raises(Refused) as caught:
        ask(rules, **body)
    assert caught.value.status == 400
    return str(json.loads(caught.value.body())["error"]["message"])


def answer(*vectors: list[float]) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": base64.b64encode(np.asarray(vector, "f4").tobytes()).decode()}
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "usage": {"prompt_tokens": 9, "total_tokens": 9}}


def vectors(whole: dict[str, Any]) -> list[list[float]]:
    return [np.frombuffer(base64.b64decode(item["embedding"]), np.float32).tolist() for item in whole["data"]]


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_parts_are_within_the_limit_overlap_and_have_the_prompt(prompt: str) -> None:
    batch = ask(input=["short", LONG, "shorter"], long_texts="chunk", prompt_name="query" if prompt else None)
    parts = [str(text) for text in batch.inputs]
    assert parts[0] == f"{prompt}short"
    assert parts[-1] == f"{prompt}shorter"
    of_long = [part.removeprefix(prompt).split() for part in parts[1:-1]]
    assert all(part.startswith(prompt) and words(part) <= 40 for part in parts)
    assert set(of_long[0]) & set(of_long[1])
    assert {word for part in of_long for word in part} == set(LONG.split())
    assert batch.count == 3
    assert [len(tokens) for tokens in batch.part_tokens] == [1, len(of_long), 1]
    assert list(batch.part_tokens[1]) == [words(part) for part in parts[1:-1]]
    assert [batch.name(index) for index in (0, 1, len(parts) - 2, len(parts) - 1)] == [f"input[{n}]" for n in (0, 1, 1, 2)]


def test_the_server_or_the_request_decides() -> None:
    chunking = replace(RULES, long_texts="chunk")
    assert len(ask(chunking, input=LONG).inputs) > 2
    assert "101 tokens; the limit is 40" in refused(chunking, input=LONG, long_texts="refuse")
    assert "101 tokens" in refused(chunking, input=LONG, truncate="NONE")
    assert ask(chunking, input=LONG, truncate_prompt_tokens=9).body["truncate_prompt_tokens"] == 9
    assert ask(input=LONG, long_texts="truncate").body["truncate_prompt_tokens"] == 40
    assert not ask(chunking, input="short").part_tokens
    for fields in ({"long_texts": "cut"}, {"long_texts": 1}, {"long_texts": "chunk", "truncate": True}):
        assert "long_texts" in refused(input=LONG, **fields)
    assert "long_texts" in refused(input=LONG, long_texts="chunk", truncate_prompt_tokens=9)
    assert "long_texts" in refused(input=LONG, long_text="chunk")  # misspelt


def test_too_many_parts_are_refused_and_so_is_a_prompt_that_leaves_no_room() -> None:
    assert "parts; a request may have 8" in refused(input=[LONG] * 3, long_texts="chunk")
    assert "the prompt leaves no room" in refused(input=LONG, long_texts="chunk", instruction="word " * 30)


def test_token_ids_are_not_split() -> None:
    rules = replace(RULES, allow_token_ids=True, table_rows=99, long_texts="chunk")
    assert "41 tokens; the limit is 40" in refused(rules, input=[1] * 41)


def test_the_vector_of_a_text_is_the_mean_of_its_parts_by_tokens() -> None:
    parts = answer([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])
    tokens = [[1], [30, 10], [1]]
    whole = long_texts.merged(parts, tokens, normalized=False)
    assert vectors(whole) == [[1, 0, 0, 0], [0, 0.75, 0.25, 0], [0, 0, 0, 1]]
    assert [(item["index"], item.get("parts")) for item in whole["data"]] == [(0, None), (1, 2), (2, None)]
    assert whole["usage"] == parts["usage"]
    unit = vectors(long_texts.merged(parts, tokens, normalized=True))
    np.testing.assert_allclose(unit[1], np.array([0, 3, 1, 0]) / 10**0.5, rtol=1e-6)


def test_opposite_parts_give_no_nan() -> None:
    (vector,) = vectors(long_texts.merged(answer([1, 0, 0, 0], [-1, 0, 0, 0]), [[5, 5]], normalized=True))
    assert vector == [0, 0, 0, 0]
