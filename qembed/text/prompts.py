"""Prompts: the text that a model expects before a query or a document."""

from __future__ import annotations

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def instruct(instruction: str) -> str:
    """Qwen3-Embedding's prompt for a query of the task that `instruction` describes."""
    return f"Instruct: {instruction}\nQuery:"


DEFAULT_PROMPTS = {"query": instruct(DEFAULT_INSTRUCTION), "document": ""}
"""Prompts by name, where a checkpoint brings none or is not at hand."""
