"""Prompts of models of which only the name is known."""

from __future__ import annotations

import pytest

from qembed.errors import BadInput
from qembed.text.prompts import DEFAULT_PROMPTS, chosen_prompt, default_prompts, is_qwen3_embedding


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-Embedding-0.6B", "qwen3-embedding:8b", "sample", "sample-AWQ-INT4", "out/sample", "my-Qwen3-Embedding"]
)
def test_a_name_says_that_a_model_is_a_qwen3_embedding(name: str) -> None:
    assert is_qwen3_embedding(None, name)
    assert default_prompts(name) == DEFAULT_PROMPTS
    assert chosen_prompt(None, "query", None, "", model=name) == DEFAULT_PROMPTS["query"]
    with pytest.raises(BadInput, match="document, query"):
        chosen_prompt(None, "passage", None, "", model=name)


@pytest.mark.parametrize("name", ["intfloat/e5-mistral-7b-instruct", "samples", "sample-2", "Qwen/Qwen3-0.6B"])
def test_prompts_of_other_models_are_not_guessed(name: str) -> None:
    assert not is_qwen3_embedding(name)
    assert default_prompts(name) == {"query": "", "document": ""}
    for prompt in ("query", "document"):
        with pytest.raises(BadInput, match="--model"):
            chosen_prompt(None, prompt, None, "", model=name)
