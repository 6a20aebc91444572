"""Token rows → batches: padding, and prefixes of texts as additional texts.

A text's vector is the hidden state of its last token. Attention is causal, so the tokens of a prefix have the same hidden
states as in the full text; only the prefix's own last token is missing. If the tokenizer appends a last token
(`<|endoftext|>`), copies of it are placed after the text. Each copy has the position after its prefix, and attends only to that
prefix and itself. A single pass then gives the vectors of many texts, including short ones, at the cost of a few tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIN_PREFIX = 3
"""Length in tokens of the shortest prefix."""
SMALLEST_SQUARE = 1e-12


@dataclass(frozen=True)
class Batch:
    """Rows of B texts, padded on the right to L positions.

    Attributes:
        ids: [B, L] int64.
        positions: [B, L] int64, the position of each token in its text.
        visible: [B, 1, L, L] bool, which positions (last axis) each position attends to; None is plain causal attention, in
            which no token attends to the padding after it.
        ends: [B] int64, the position in the row of each text's own last token.
        last: [B, L] bool, the last tokens of texts and prefixes, whose hidden states become vectors.
        weight: [B, L] float32, the weight of each position in the calibration's sums: 0 for padding, 1 on average.
        fold: the half of the calibration, 0 or 1, that all texts of the batch belong to, for cross-validation.
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
    """Batches of the rows with these `numbers`, grouped by length, of at most `tokens` positions each.

    A row longer than `tokens` gets a batch of its own.
    """
    return [_batch(rows, group, {}, appended=False) for group in _group_by_length(numbers, [len(row) for row in rows], tokens)]


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
    """Batches as from `plain`, with prefixes of each text, and with weights for the last tokens.

    Args:
        rows: the token ids of each text.
        numbers: indices of the rows to use.
        tokens: maximum number of positions in a batch.
        prefixes: maximum number of prefixes per text; 0 for none.
        last_share: 0…1, the total weight of the last tokens of texts and prefixes; 0 weights all tokens equally.
        seed: draws the lengths of the prefixes.
        folds: the fold, 0 or 1, of each of `numbers`; no batch contains texts of both. None: all are in fold 0.
    """
    draw = random.Random(seed)
    cuts = {number: _cuts(len(rows[number]), prefixes, draw) for number in numbers}
    appended = have_same_end(rows, numbers)
    lengths = [len(row) + (len(cuts.get(number, ())) if appended else 0) for number, row in enumerate(rows)]
    batches = []
    for fold in (0, 1):
        members = [number for number in numbers if (folds or {}).get(number, 0) == fold]
        for group in _group_by_length(members, lengths, tokens):
            batches.append(replace(_batch(rows, group, cuts, appended=appended), fold=fold))
    _weight_last_tokens(batches, last_share)
    return batches


def have_same_end(rows: Sequence[Sequence[int]], numbers: Iterable[int]) -> bool:
    """Whether the rows with these `numbers` all end with the same token: then the tokenizer appends it."""
    return len({rows[number][-1] for number in numbers}) == 1


def by_length(rows: Sequence[Sequence[int]], numbers: Iterable[int]) -> list[int]:
    """`numbers` in the order in which the rows come in the batches of `plain`."""
    return sorted(numbers, key=lambda number: (len(rows[number]), number))


def _cuts(length: int, prefixes: int, draw: random.Random) -> list[int]:
    """Random lengths of up to `prefixes` prefixes of a text of `length` tokens, ascending."""
    possible = range(MIN_PREFIX, length - 1)
    return sorted(draw.sample(possible, min(prefixes, len(possible))))


def _group_by_length(numbers: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Split `numbers`, sorted by length, into groups of at most `tokens` positions after padding."""
    groups: list[list[int]] = [[]]
    for number in sorted(numbers, key=lambda number: (lengths[number], number)):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[number] > tokens:
            groups.append([])
        groups[-1].append(number)
    return [group for group in groups if group]


def _batch(
    rows: Sequence[Sequence[int]], numbers: Sequence[int], cuts: Mapping[int, Sequence[int]], *, appended: bool
) -> Batch:
    """A batch of the rows with these `numbers`, in which every token has weight 1.

    `cuts` are the lengths of the prefixes of each row. If the tokenizer's last token is `appended`, a copy of it ends each
    prefix; otherwise the prefix's own last token does.
    """
    import torch

    copies = cuts if appended else {}
    count, longest = len(numbers), max(len(rows[number]) + len(copies.get(number, ())) for number in numbers)
    ids, positions = torch.zeros(count, longest, dtype=torch.int64), torch.zeros(count, longest, dtype=torch.int64)
    weight, last = torch.zeros(count, longest), torch.zeros(count, longest, dtype=torch.bool)
    positions[:] = torch.arange(longest)
    visible = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(count, 1, 1) if copies else None
    for index, number in enumerate(numbers):
        row = rows[number]
        end = len(row)
        ids[index, :end] = torch.tensor(row)
        weight[index, :end] = 1
        last[index, end - 1] = True
        if not appended:
            for cut in cuts.get(number, ()):
                last[index, cut - 1] = True
            continue
        for column, cut in enumerate(copies.get(number, ()), end):
            ids[index, column], positions[index, column], weight[index, column], last[index, column] = row[-1], cut, 1, True
            if visible is not None:
                visible[index, column] = False
                visible[index, column, :cut] = True
                visible[index, column, column] = True
    ends = torch.tensor([len(rows[number]) - 1 for number in numbers])
    return Batch(ids, positions, None if visible is None else visible[:, None], ends, last, weight)


def _weight_last_tokens(batches: Sequence[Batch], last_share: float) -> None:
    """Set the weights so that all last tokens together have the share `last_share`, with a mean of 1; 0 changes nothing."""
    last = sum(int(batch.last.sum()) for batch in batches)
    others = sum(int((batch.weight > 0).sum()) for batch in batches) - last
    if last_share and last and others:
        for batch in batches:
            batch.weight.mul_((1 - last_share) * (last + others) / others)
            batch.weight[batch.last] = last_share * (last + others) / last
