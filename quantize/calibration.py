"""Tokenizes calibration texts into rows of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.vocabulary import panics
from qembed.errors import BadInput
from qembed.quantize import batches, calibration_texts
from qembed.quantize.calibration_texts import Texts
from qembed.text.cleaning import clean

LONG_TEXTS = 4
"""One text in this many keeps its length when texts are shortened."""
SHORTEST = 16
"""Length in tokens below which no text is shortened."""


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids and their provenance.

    Attributes:
        rows: the token ids of each text, including the token that the tokenizer appends.
        check: indices of the held-out rows, which measure fidelity; quantization never sees them.
        source: name of the texts: "built-in", or the name of the user's file.
        sha256: hash of the file that the texts come from.
        cut: number of texts longer than `max_tokens`.
        shortened: number of further texts that were shortened to keep within the token budget.
        queries: for a reranker, the number of the query that each row is about; empty otherwise.
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
    shortened: int = 0
    queries: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens that quantization sees (held-out rows excluded)."""
        return sum(len(row) for number, row in enumerate(self.rows) if number not in self.check)


def built_in(checkpoint: Checkpoint, *, max_tokens: int, check: int, seed: int, token_budget: int | None = None) -> Calibration:
    """Tokenize the texts that ship with qembed, as many as are drawn by default; see `prepare`."""
    texts = calibration_texts.built_in(seed=seed)
    return prepare(texts, checkpoint, max_tokens=max_tokens, check=check, seed=seed, token_budget=token_budget)


def prepare(
    texts: Texts, checkpoint: Checkpoint, *, max_tokens: int, check: int, seed: int, token_budget: int | None = None
) -> Calibration:
    """Tokenize `texts` with their prompts, each cut to `max_tokens` tokens including the token that the tokenizer appends.

    `seed` draws `check` rows to hold out for measuring fidelity. The others are shortened until they have at most
    `token_budget` tokens together, see `shorten`; None leaves them as they are.

    Raises:
        BadInput: a text has only invisible characters; the tokenizer returns no ids, or an id outside the token table; or a
            text of the user is longer than the model's context (texts that ship with qembed are cut to it instead).
    """
    tokenizer = checkpoint.tokenizer()
    if empty := next((text.id for text in texts.texts if not clean(text.text).strip()), None):
        raise BadInput(f"{empty}: the text is empty once invisible characters are removed")
    inputs = [text.model_input(checkpoint.prompts, checkpoint.trunk.document_prompt) for text in texts.texts]
    with panics(str(checkpoint.folder)):
        encoded = [tokenizer.encode(text).ids for text in inputs]
    vocabulary, context = checkpoint.config["vocab_size"], checkpoint.trunk.context
    for text, row in zip(texts.texts, encoded, strict=True):
        if not row:
            raise BadInput(f"{text.id}: the tokenizer of {checkpoint.folder} makes no tokens from it")
        if (largest := max(row)) >= vocabulary:
            raise BadInput(f"{checkpoint.folder}: the tokenizer gives id {largest}, the token table has {vocabulary} rows")
        if len(row) > context and texts.source != calibration_texts.SOURCE:
            raise BadInput(f"{text.id}: {len(row)} tokens, the model's context is {context}; shorten the text or leave it out")
    length = min(max_tokens, context)
    tokenizer.enable_truncation(length)
    cut = [number for number, row in enumerate(encoded) if len(row) > length]
    for number in cut:
        encoded[number] = tokenizer.encode(inputs[number]).ids
    held_out = frozenset(random.Random(seed).sample(range(len(encoded)), check))
    rows, shortened = encoded, 0
    if token_budget is not None:
        rows = shorten(encoded, [number for number in range(len(encoded)) if number not in held_out], token_budget)
        shortened = sum(len(row) != len(whole) for row, whole in zip(rows, encoded, strict=True))
    return Calibration(rows, held_out, texts.source, texts.sha256, len(cut), length, seed, shortened)


def shorten(rows: Sequence[Sequence[int]], numbers: Sequence[int], budget: int) -> list[list[int]]:
    """`rows` of token ids, those with these `numbers` shortened so that they have at most `budget` tokens together.

    Many short texts show a layer more than few long ones, for the same time. But attention over long texts must be seen too:
    one text in LONG_TEXTS keeps its length. The others are cut to one length, the largest within the budget, but at least
    SHORTEST tokens. If all rows end with the same token, which the tokenizer then appends, a shortened row ends with it too.
    """
    whole = set(numbers[::LONG_TEXTS])
    others = set(numbers) - whole
    left = budget - sum(len(rows[number]) for number in whole)
    lengths = [len(rows[number]) for number in others]
    length = max(lengths, default=0)
    while length > SHORTEST and sum(min(other, length) for other in lengths) > left:
        length -= 1
    end = 1 if batches.have_same_end(rows, numbers) else 0
    return [
        [*row[: length - end], *row[len(row) - end :]] if number in others and len(row) > length else list(row)
        for number, row in enumerate(rows)
    ]
