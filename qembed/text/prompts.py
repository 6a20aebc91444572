"""Prompts: the text that a model expects before a query or a document."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qembed.errors import BadInput
from qembed.text.cleaning import clean

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def instruct(instruction: str) -> str:
    """Qwen3-Embedding's prompt for a query of the task that `instruction` describes."""
    return f"Instruct: {instruction}\nQuery:"


DEFAULT_PROMPTS = {"query": instruct(DEFAULT_INSTRUCTION), "document": ""}
"""Qwen3-Embedding's prompts by name."""
NO_PROMPTS = {"query": "", "document": ""}
"""The prompts of other models that define none, as in sentence-transformers."""
QWEN3_EMBEDDING = re.compile(r"qwen3-embedding|(?:^|/)sample(?:-awq-int4)?$", re.IGNORECASE)
"""In the names of Qwen3-Embedding models, and of the sample, which is made from one."""


def is_qwen3_embedding(*names: str | None) -> bool:
    """Whether one of a model's `names` says that it is a Qwen3-Embedding: its own, or that of its source."""
    return any(QWEN3_EMBEDDING.search(name) for name in names if name)


def default_prompts(*names: str | None) -> dict[str, str]:
    """Prompts by name of a model with these `names` where its folder has none."""
    return dict(DEFAULT_PROMPTS if is_qwen3_embedding(*names) else NO_PROMPTS)


def chosen_prompt(
    prompts: Mapping[str, str] | None,
    name: str | None,
    instruction: str | None,
    default: str,
    *,
    model: str = "",
    cleaned: bool = True,
) -> str:
    """The prompt that the options --prompt (`name`, "" for none) and --instruction choose; `default` without either.

    `prompts` are the model's, or None if only its name is known (`model`), because a server has it. `cleaned`: the instruction
    is cleaned as texts are.

    Raises:
        BadInput: the model has no such prompt, its prompts are not known here, or the instruction is empty.
    """
    if instruction is not None:
        task = clean(instruction) if cleaned else instruction
        if not task.strip():
            raise BadInput("--instruction is empty")
        return instruct(task)
    if name is None:
        return default
    if not name:
        return ""
    if prompts is None:
        if not is_qwen3_embedding(model):
            raise BadInput(
                f"the prompts of {model} are not known here: name its folder with --model, or give --instruction, or --prompt "
                "'' for none"
            )
        prompts = DEFAULT_PROMPTS
    if name not in prompts:
        raise BadInput(f"--prompt {name}: the model has {', '.join(sorted(prompts))}")
    return prompts[name]
