"""Batches of token rows: padding, and prefixes of each text as additional texts.

A text's vector is the hidden state of its last token. Attention is causal, so the tokens of a prefix have the same states as
in the whole text; only the prefix's own last token is missing. If the tokenizer appends one (`<|endoftext|>`), copies of it are
put after the text, each with the position that follows its prefix, and attending to that prefix alone. One forward pass then
computes the vectors of many texts, short ones included, for the price of a few tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHORTEST_PREFIX = 3
SMALLEST_SQUARE = 1e-12


@dataclass(frozen=True)
class Batch:
    """Rows of B texts, padded on the right to L positions.

    Attributes:
        ids: [B, L] int64.
        positions: [B, L] int64, position of each token in its text.
        visible: [B, 1, L, L] bool, attention mask; None is plain causal attention, which never reaches the padding.
        ends: [B] int64, index in the row of each text's last token.
        last: [B, L] bool, the last tokens of texts and prefixes, whose hidden states become vectors.
        weight: [B, L] float32, weight of each position in the moments: 0 for padding, 1 on average.
        fold: the cross-validation fold that all its texts belong to.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor | None
    ends: torch.Tensor
    last: torch.Tensor
    weight: torch.Tensor
    fold: int = 0

    def relative_to(self, residual: torch.Tensor) -> Batch:
        """The batch with each token's weight divided by the mean square of its `residual` [B, L, hidden].

        The first token of a text can have a residual stream a thousand times the size of the others' ("massive activations",
        Sun et al. 2024, https://arxiv.org/abs/2402.17762), and would decide the sums alone.
        """
        return replace(self, weight=self.weight / residual.square().mean(-1).clamp(min=SMALLEST_SQUARE).to(self.weight.device))


def plain(rows: Sequence[Sequence[int]], numbers: Sequence[int], tokens: int) -> list[Batch]:
    """Batches of the rows in `numbers`, grouped by length, with at most `tokens` positions each."""
    return [_batch(rows, batch, None) for batch in _grouped(numbers, [len(row) for row in rows], tokens)]


def with_prefixes(
    rows: Sequence[Sequence[int]],
    numbers: Sequence[int],
    tokens: int,
    *,
    prefixes: int,
    last_share: float,
    seed: int,
    folds: Mapping[int, int] | None = None,
) -> list[Batch]:
    """As `plain`, with prefixes of each text, and a given share of the weight on last tokens.

    A row longer than `tokens` gets a batch of its own.

    Args:
        rows: token ids of each text.
        numbers: indices of the rows to use.
        tokens: positions per batch.
        prefixes: prefixes per text, at random cuts; 0 for none.
        last_share: 0…1, total weight of all last tokens; 0 weights every token equally.
        seed: of the cuts.
        folds: fold (0 or 1) by row index; no batch spans both. None: all in fold 0.
    """
    draw = random.Random(seed)
    cuts = {number: _cuts(len(rows[number]), prefixes, draw) for number in numbers}
    lengths = [len(row) + len(cuts.get(number, ())) for number, row in enumerate(rows)]
    appended = ends_alike(rows, numbers)
    if not appended:
        lengths = [len(row) for row in rows]
    made = []
    for fold in (0, 1):
        members = [number for number in numbers if (folds or {}).get(number, 0) == fold]
        for batch in _grouped(members, lengths, tokens):
            made.append(replace(_batch(rows, batch, cuts, appended=appended), fold=fold))
    return _weighted(made, last_share)


def ends_alike(rows: Sequence[Sequence[int]], numbers: Iterable[int]) -> bool:
    """Whether all rows in `numbers` end with the same token, as they do if the tokenizer appends one."""
    return len({rows[number][-1] for number in numbers}) == 1


def _cuts(length: int, prefixes: int, draw: random.Random) -> list[int]:
    possible = range(SHORTEST_PREFIX, length - 1)
    return sorted(draw.sample(possible, min(prefixes, len(possible))))


def _grouped(numbers: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for number in sorted(numbers, key=lambda number: (lengths[number], number)):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[number] > tokens:
            groups.append([])
        groups[-1].append(number)
    return [group for group in groups if group]


def _batch(
    rows: Sequence[Sequence[int]], numbers: Sequence[int], cuts: dict[int, list[int]] | None, *, appended: bool = True
) -> Batch:
    """One batch with weight 1 for every token."""
    import torch

    extra = cuts if cuts and appended else {}
    count, longest = len(numbers), max(len(rows[number]) + len(extra.get(number, ())) for number in numbers)
    ids, positions = torch.zeros(count, longest, dtype=torch.int64), torch.zeros(count, longest, dtype=torch.int64)
    weight, last = torch.zeros(count, longest), torch.zeros(count, longest, dtype=torch.bool)
    positions[:] = torch.arange(longest)
    visible = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(count, 1, 1) if extra else None
    for place, number in enumerate(numbers):
        row = rows[number]
        end = len(row)
        ids[place, :end] = torch.tensor(row)
        weight[place, :end] = 1
        last[place, end - 1] = True
        for step, cut in enumerate((cuts or {}).get(number, ())):
            if not appended:
                last[place, cut - 1] = True
                continue
            at = end + step
            ids[place, at], positions[place, at], weight[place, at], last[place, at] = row[-1], cut, 1, True
            if visible is not None:
                visible[place, at] = False
                visible[place, at, :cut] = True
                visible[place, at, at] = True
    ends = torch.tensor([len(rows[number]) - 1 for number in numbers])
    return Batch(ids, positions, None if visible is None else visible[:, None], ends, last, weight)


def _weighted(made: list[Batch], last_share: float) -> list[Batch]:
    last = sum(int(batch.last.sum()) for batch in made)
    others = sum(int((batch.weight > 0).sum()) for batch in made) - last
    if last_share and last and others:
        for batch in made:
            batch.weight.mul_((1 - last_share) * (last + others) / others)
            batch.weight[batch.last] = last_share * (last + others) / last
    return made
