"""Tokenizes calibration texts into rows of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.vocabulary import panics
from qembed.errors import BadInput
from qembed.quantize import calibration_texts
from qembed.quantize.calibration_texts import Texts
from qembed.text.cleaning import clean


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids and their provenance.

    Attributes:
        rows: the token ids of each text, including the token that the tokenizer appends.
        check: indices of the held-out rows, which measure fidelity; quantization never sees them.
        source: name of the texts: "built-in", or the name of the user's file.
        sha256: hash of the file that the texts come from.
        cut: number of texts longer than `max_tokens`.
        max_tokens: length in tokens that longer texts are cut to.
        seed: seed of every random choice.
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
        """Number of tokens that quantization sees (held-out rows excluded)."""
        return sum(len(row) for number, row in enumerate(self.rows) if number not in self.check)


def built_in(checkpoint: Checkpoint, *, max_tokens: int, check: int, seed: int) -> Calibration:
    """Tokenize all texts that ship with qembed; see `prepare`."""
    return prepare(calibration_texts.built_in(), checkpoint, max_tokens=max_tokens, check=check, seed=seed)


def prepare(texts: Texts, checkpoint: Checkpoint, *, max_tokens: int, check: int, seed: int) -> Calibration:
    """Tokenize `texts` with their prompts, each cut to `max_tokens` tokens including the token that the tokenizer appends.

    `seed` draws `check` rows to hold out for measuring fidelity.

    Raises:
        BadInput: a text has only invisible characters; the tokenizer returns no ids, or an id outside the token table; or a
            text of the user is longer than the model's context (texts that ship with qembed are cut to it instead).
    """
    tokenizer = checkpoint.tokenizer()
    if empty := next((text.id for text in texts.texts if not clean(text.text).strip()), None):
        raise BadInput(f"{empty}: the text is empty once invisible characters are removed")
    inputs = [text.model_input(checkpoint.prompts) for text in texts.texts]
    with panics(str(checkpoint.folder)):
        encoded = [tokenizer.encode(text).ids for text in inputs]
    vocabulary, context = checkpoint.config["vocab_size"], checkpoint.config.get("max_position_embeddings")
    for text, row in zip(texts.texts, encoded, strict=True):
        if not row:
            raise BadInput(f"{text.id}: the tokenizer of {checkpoint.folder} makes no tokens from it")
        if (largest := max(row)) >= vocabulary:
            raise BadInput(f"{checkpoint.folder}: the tokenizer gives id {largest}, the token table has {vocabulary} rows")
        if context is not None and len(row) > context and texts.source != calibration_texts.SOURCE:
            raise BadInput(f"{text.id}: {len(row)} tokens, the model's context is {context}; shorten the text or leave it out")
    length = max_tokens if context is None else min(max_tokens, context)
    tokenizer.enable_truncation(length)
    cut = [number for number, row in enumerate(encoded) if len(row) > length]
    for number in cut:
        encoded[number] = tokenizer.encode(inputs[number]).ids
    held_out = frozenset(random.Random(seed).sample(range(len(encoded)), check))
    return Calibration(encoded, held_out, texts.source, texts.sha256, len(cut), length, seed)
