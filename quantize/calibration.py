"""Calibration texts → token rows."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qembed.checkpoint import Checkpoint, instruct
from qembed.errors import BadInput

if TYPE_CHECKING:
    import torch

BUILT_IN = Path(__file__).parent / "data" / "calibration.jsonl"


@dataclass(frozen=True)
class Calibration:
    """Token rows, and where they came from.

    Attributes:
        rows: the token ids of each text, the model's own last token included.
        check: the numbers of the rows that are kept apart to measure fidelity on; quantization never sees them.
        source: what the user would call it.
        sha256: hash of the file.
    """

    rows: Sequence[Sequence[int]]
    check: frozenset[int]
    source: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens that quantization sees."""
        return sum(len(row) for number, row in enumerate(self.rows) if number not in self.check)


def built_in(checkpoint: Checkpoint, *, max_tokens: int, check: int, seed: int) -> Calibration:
    """The texts that ship with qembed, queries with their prompts, each cut to `max_tokens` tokens.

    `check` of them, drawn by `seed`, are kept apart.

    Raises:
        BadInput: the tokenizer gives an id that the token table does not have.
    """
    stored = BUILT_IN.read_bytes()
    items = [json.loads(line) for line in stored.decode().split("\n") if line]
    texts = [_prompt(item, checkpoint) + item["text"] for item in items]
    tokenizer = checkpoint.tokenizer()
    tokenizer.enable_truncation(max_tokens)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    vocabulary = checkpoint.config["vocab_size"]
    if (largest := max(max(row) for row in rows)) >= vocabulary:
        raise BadInput(f"{checkpoint.folder}: the tokenizer gives id {largest}, the token table has {vocabulary} rows")
    apart = frozenset(random.Random(seed).sample(range(len(rows)), check))
    return Calibration(rows, apart, "built-in", hashlib.sha256(stored).hexdigest())


def batches(rows: Sequence[Sequence[int]], numbers: Sequence[int], tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids [B, L] int64, lengths [B] int64) pairs: rows of similar length, padded on the right, at most `tokens` a batch.

    Causal attention cannot see padding on the right. A row longer than `tokens` makes a batch by itself.
    """
    import torch

    made: list[list[int]] = [[]]
    for number in sorted(numbers, key=lambda number: (len(rows[number]), number)):
        if made[-1] and (len(made[-1]) + 1) * len(rows[number]) > tokens:
            made.append([])
        made[-1].append(number)
    found = []
    for batch in filter(None, made):
        lengths = torch.tensor([len(rows[number]) for number in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
        for place, number in enumerate(batch):
            ids[place, : len(rows[number])] = torch.tensor(rows[number])
        found.append((ids, lengths))
    return found


def _prompt(item: dict[str, str], checkpoint: Checkpoint) -> str:
    if item["kind"] != "query":
        return ""
    return instruct(item["instruction"]) if "instruction" in item else checkpoint.prompts["query"]
