"""Prompts: the text that a model expects before a query or a document."""

from __future__ import annotations

from collections.abc import Mapping

from qembed.errors import BadInput
from qembed.text.cleaning import clean

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def instruct(instruction: str) -> str:
    """Qwen3-Embedding's prompt for a query of the task that `instruction` describes."""
    return f"Instruct: {instruction}\nQuery:"


DEFAULT_PROMPTS = {"query": instruct(DEFAULT_INSTRUCTION), "document": ""}
"""Prompts by name, where a checkpoint brings none or is not at hand."""


def chosen_prompt(
    prompts: Mapping[str, str], name: str | None, instruction: str | None, default: str, *, cleaned: bool = True
) -> str:
    """The prompt that the options --prompt (`name`, "" for none) and --instruction choose; `default` without either.

    `cleaned`: the instruction is cleaned as texts are.

    Raises:
        BadInput: `prompts` has no such name, or the instruction is empty.
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
    if name not in prompts:
        raise BadInput(f"--prompt {name}: the model has {', '.join(sorted(prompts))}")
    return prompts[name]
