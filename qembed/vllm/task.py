"""Which settings go with an embedder, and which with a reranker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qembed.checkpoint.int8_table import INT8
from qembed.errors import BadInput

if TYPE_CHECKING:
    from qembed.vllm.settings import ServerSettings


def check_task(settings: ServerSettings) -> None:
    """Check that the settings are for what the checkpoint does.

    Raises:
        BadInput: one is for an embedder and the checkpoint is a reranker, or the other way round; or a reranker's token table
            is in INT8, from which vLLM cannot take the rows of yes and no.
    """
    checkpoint = settings.checkpoint
    if checkpoint.reranker is None:
        if settings.instruction is not None:
            raise BadInput(f"{checkpoint.folder}: --instruction is for a reranker; an embedder has prompts (--default-prompt)")
        return
    for_embedders = {
        "--default-prompt": settings.default_prompt is not None,
        "--normalize": settings.normalize,
        "--allow-token-ids": settings.allow_token_ids,
        "--token-table": settings.token_table is not None,
        "--engine sglang": settings.engine == "sglang",
    }
    if names := [name for name, given in for_embedders.items() if given]:
        raise BadInput(f"{checkpoint.folder}: a reranker; {', '.join(names)} is for embedders")
    if checkpoint.has_int8_table:
        raise BadInput(f"{checkpoint.folder}: a reranker needs the rows of yes and no in float; its token table is in {INT8}")
    if settings.instruction is not None and not settings.instruction.strip():
        raise BadInput("--instruction is empty")
