"""How a served model makes vectors of texts, or scores of pairs: for scripts, and in a line for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qembed.text.display import counted
from qembed.text.prompts import DEFAULT_INSTRUCTION

if TYPE_CHECKING:
    from qembed.vllm.settings import Launch


def vector_facts(launch: Launch) -> dict[str, Any] | None:
    """For scripts: how vectors are made, in JSON's types; None for a reranker, which makes none."""
    if launch.settings.checkpoint.reranker is not None:
        return None
    settings, embedder = launch.settings, launch.settings.checkpoint.embedder
    return {
        "dimensions": embedder.width,
        "matryoshka_dimensions": list(embedder.sizes) or None,
        "attention": embedder.attention,
        "pooling": embedder.pooling,
        "appended_token": settings.checkpoint.appended_token,
        "dense": len(embedder.dense),
        "normalized": settings.normalized,
        "default_prompt": settings.prompt_name,
        "lower_case": embedder.lower_case,
    }


def vectors_line(launch: Launch) -> str:
    """The same for people, in one line; of a reranker what its scores are."""
    if (reranker := launch.settings.checkpoint.reranker) is not None:
        instruction = launch.settings.instruction or DEFAULT_INSTRUCTION
        form = "of yes and no" if reranker.form == "original" else "of its one label"
        return f"scores of a query with a document are probabilities {form}, default instruction {instruction!r}"
    settings, embedder = launch.settings, launch.settings.checkpoint.embedder
    appended = settings.checkpoint.appended_token
    state = "the mean of all tokens" if embedder.pooling == "mean" else "the last token"
    state += "" if appended is None else f" (with {appended} appended)"
    parts = [
        f"vectors have {counted(embedder.width, 'number')}: {state}",
        *(["bidirectional attention"] if not embedder.is_causal else []),
        *([counted(len(embedder.dense), "dense layer")] if embedder.dense else []),
        "unit length" if settings.normalized else "no unit length",
        f"default prompt {settings.prompt_name!r}" if settings.prompt_name else "no default prompt",
        *(["lower case"] if embedder.lower_case else []),
    ]
    return ", ".join(parts)
