"""Calibration texts → token rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.quantize import calibration_texts
from qembed.quantize.calibration_texts import Texts


@dataclass(frozen=True)
class Calibration:
    """Token rows, and where they came from.

    Attributes:
        rows: the token ids of each text, the model's own last token included.
        check: the numbers of the rows that are kept apart to measure fidelity on; quantization never sees them.
        source: what the user would call it.
        sha256: hash of the file.
        cut: how many texts were longer than `max_tokens`.
        max_tokens: where they were cut.
        seed: what chance decides by.
    """

    rows: Sequence[Sequence[int]]
    check: frozenset[int]
    source: str
    sha256: str
    cut: int
    max_tokens: int
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens that quantization sees."""
        return sum(len(row) for number, row in enumerate(self.rows) if number not in self.check)


def built_in(checkpoint: Checkpoint, *, max_tokens: int, check: int, seed: int) -> Calibration:
    """All texts that ship with qembed, as `prepare` makes them."""
    return prepare(calibration_texts.built_in(), checkpoint, max_tokens=max_tokens, check=check, seed=seed)


def prepare(found: Texts, checkpoint: Checkpoint, *, max_tokens: int, check: int, seed: int) -> Calibration:
    """Token rows of texts, queries with their prompts, each cut to `max_tokens` tokens, the model's own last token kept.

    `check` of them, drawn by `seed`, are kept apart.

    Raises:
        BadInput: the tokenizer gives no ids, or one that the token table does not have; or a text of the user's is longer than
            the model's context (texts that ship with qembed are cut there).
    """
    tokenizer = checkpoint.tokenizer()
    encoded = [tokenizer.encode(text.prompted(checkpoint.prompts)).ids for text in found.texts]
    vocabulary, context = checkpoint.config["vocab_size"], checkpoint.config.get("max_position_embeddings")
    for text, row in zip(found.texts, encoded, strict=True):
        if not row:
            raise BadInput(f"{text.id}: the tokenizer of {checkpoint.folder} makes no tokens of it")
        if (largest := max(row)) >= vocabulary:
            raise BadInput(f"{checkpoint.folder}: the tokenizer gives id {largest}, the token table has {vocabulary} rows")
        if context is not None and len(row) > context and found.source != calibration_texts.SOURCE:
            raise BadInput(f"{text.id}: {len(row)} tokens, the model's context is {context}; shorten the text or leave it out")
    length = max_tokens if context is None else min(max_tokens, context)
    tokenizer.enable_truncation(length)
    cut = [number for number, row in enumerate(encoded) if len(row) > length]
    for number in cut:
        encoded[number] = tokenizer.encode(found.texts[number].prompted(checkpoint.prompts)).ids
    apart = frozenset(random.Random(seed).sample(range(len(encoded)), check))
    return Calibration(encoded, apart, found.source, found.sha256, len(cut), length, seed)
