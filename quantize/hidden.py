"""Hidden states on their way through the layers, and the sums that calibration takes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qembed.quantize.batches import Batch
from qembed.quantize.blocks import DecoderLayer, rms_norm
from qembed.quantize.products import linear

if TYPE_CHECKING:
    import torch

    from qembed.quantize.table import Rows


PANEL = 512
"""Columns of a Gram matrix that are summed at a time: what lies above the diagonal of a panel is not computed, but mirrored."""


@dataclass
class Stream:
    """Hidden states [B, L, hidden] float32 of the tokens of `batches`, on their way through the layers."""

    batches: list[Batch]
    hidden: list[torch.Tensor]

    @classmethod
    def start(cls, rows: torch.Tensor | Rows, batches: list[Batch]) -> Stream:
        """Look up the ids of `batches` in the token table [vocabulary, hidden], or in `rows` of it."""
        return cls(batches, [rows[batch.ids].float() for batch in batches])

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Pairs of a batch and its hidden states."""
        return zip(self.batches, self.hidden, strict=True)

    def advance(self, block: DecoderLayer) -> list[torch.Tensor]:
        """Send every batch through the layer that `block` holds; returns the hidden states in its middle, after attention."""
        import torch

        middles = []
        with torch.no_grad():
            for number, (batch, hidden) in enumerate(self):
                middle = block.attend(hidden.to(block.device), batch)
                middles.append(middle.to(hidden.device))
                self.hidden[number] = block.feed(middle).to(hidden.device)
        return middles

    def vectors(self, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Unit vectors [texts, hidden]: each text's own last token after the final norm with `weight` [hidden]."""
        import torch

        rows = torch.cat([hidden[torch.arange(len(batch.ends)), batch.ends] for batch, hidden in self])
        return torch.nn.functional.normalize(rms_norm(rows, weight, epsilon), dim=-1)


@dataclass
class OriginalStates:
    """The original model's hidden states [B, L, hidden] of each batch: before a layer, after its attention, and after it."""

    before: list[torch.Tensor]
    middle: list[torch.Tensor]
    after: list[torch.Tensor]


@dataclass
class Moments:
    """Weighted sums over the tokens that a linear reads, float32.

    Attributes:
        gram: Σ x xᵀ [K, K].
        cross: Σ d xᵀ [D, K]. Behind a norm d is what x has drifted by, x of the original model less that of here; elsewhere it
            is what the linear should put out.
    """

    gram: torch.Tensor
    cross: torch.Tensor | None = None

    @classmethod
    def by_fold(cls, found: Iterable[tuple[Batch, torch.Tensor, torch.Tensor | None]]) -> list[Moments]:
        """As `of`, one for each fold; batches of a fold follow one another."""
        return [cls.of(part) for _, part in groupby(found, key=lambda one: one[0].fold)]

    @classmethod
    def total(cls, folds: Sequence[Moments]) -> Moments:
        """The sums over all of `folds`."""
        first, *others = folds
        gram, cross = first.gram, first.cross
        for other in others:
            gram = gram + other.gram
            cross = None if cross is None or other.cross is None else cross + other.cross
        return cls(gram, cross)

    @classmethod
    def of(cls, found: Iterable[tuple[Batch, torch.Tensor, torch.Tensor | None]]) -> Moments:
        """Sum over (batch, x [B, L, K], d [B, L, D] or None)."""
        gram: torch.Tensor | None = None
        cross: torch.Tensor | None = None
        for batch, x, missing in found:
            columns = x.flatten(0, 1).T.contiguous()
            weighted = columns * batch.weight.to(x.device).flatten()  # padding counts 0
            gram = x.new_zeros(x.shape[-1], x.shape[-1]) if gram is None else gram
            for start in range(0, x.shape[-1], PANEL):
                gram[start:, start : start + PANEL] += linear(columns[start:], weighted[start : start + PANEL])
            if missing is not None:
                more = linear(missing.flatten(0, 1).T, weighted)
                cross = more if cross is None else cross.add_(more)
        if gram is None:
            raise ValueError("no batches")
        return cls(gram.tril() + gram.tril(-1).T, cross)
