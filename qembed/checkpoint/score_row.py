"""The row that makes a reranker's score of a state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.files import open_tensors
from qembed.checkpoint.reranker import LABEL_HEAD, Reranker
from qembed.errors import BadInput

if TYPE_CHECKING:
    import torch

LANGUAGE_HEAD = "lm_head.weight"


def score_row(checkpoint: Checkpoint, reranker: Reranker) -> torch.Tensor:
    """The row [hidden] float32 whose product with the last state is the logit of yes less that of no.

    Raises:
        BadInput: the tensor is missing, its file is damaged, or the token table, which has the rows, is in INT8.
    """
    if reranker.form == "converted":
        return checkpoint.tensor(LABEL_HEAD)[0].float()
    tied = checkpoint.config.get("tie_word_embeddings") or LANGUAGE_HEAD not in checkpoint.files
    name = f"{checkpoint.prefix}embed_tokens.weight" if tied else LANGUAGE_HEAD
    if name not in checkpoint.files:
        raise BadInput(f"{checkpoint.folder}: tensor {name} is missing")
    if tied and checkpoint.has_int8_table:
        raise BadInput(f"{checkpoint.folder}: a reranker needs the rows of yes and no in float; its token table is in int8")
    with open_tensors(checkpoint.files[name]) as tensors:
        stored = tensors.get_slice(name)
        no, yes = (stored[id_ : id_ + 1][0].float() for id_ in reranker.answers)
    return yes - no
