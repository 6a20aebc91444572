"""Hidden states on their way through the layers, and their second moments, which quantization is fitted to.

For a linear layer the squared output error of a weight change ΔW over the calibration tokens is tr(ΔW · G · ΔWᵀ) with the Gram
matrix G = Σ x xᵀ of its inputs. GPTQ's Hessian is H = 2 G.
"""

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
"""Columns of a Gram matrix summed at a time. Only panels on and below the diagonal are computed; the rest is mirrored."""


@dataclass
class Stream:
    """Hidden states [B, L, hidden] float32 of the tokens of `batches`, on their way through the layers."""

    batches: list[Batch]
    hidden: list[torch.Tensor]

    @classmethod
    def start(cls, rows: torch.Tensor | Rows, batches: list[Batch]) -> Stream:
        """Hidden states before the first layer: the ids of `batches` in the token table `rows` [vocabulary, hidden]."""
        return cls(batches, [rows[batch.ids].float() for batch in batches])

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Pairs (batch, hidden states)."""
        return zip(self.batches, self.hidden, strict=True)

    def advance(self, block: DecoderLayer) -> list[torch.Tensor]:
        """Run every batch through the layer loaded in `block`; returns the hidden states between attention and MLP."""
        import torch

        middles = []
        with torch.no_grad():
            for number, (batch, hidden) in enumerate(self):
                middle = block.attend(hidden.to(block.device), batch)
                middles.append(middle.to(hidden.device))
                self.hidden[number] = block.feed(middle).to(hidden.device)
        return middles

    def vectors(self, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Unit vectors [texts, hidden]: the last token of each text after the final norm with `weight` [hidden]."""
        import torch

        rows = torch.cat([hidden[torch.arange(len(batch.ends)), batch.ends] for batch, hidden in self])
        return torch.nn.functional.normalize(rms_norm(rows, weight, epsilon), dim=-1)


@dataclass
class OriginalStates:
    """Hidden states [B, L, hidden] of each batch in the original model: before a layer, after its attention, and after it."""

    before: list[torch.Tensor]
    middle: list[torch.Tensor]
    after: list[torch.Tensor]


@dataclass
class Moments:
    """Weighted sums over the tokens that a linear reads, float32.

    Attributes:
        gram: Gram matrix Σ x xᵀ [K, K].
        cross: Σ d xᵀ [D, K]; None if nothing is corrected. q/k/v and gate/up: d = x_original − x. o_proj and down_proj:
            d = target output.
    """

    gram: torch.Tensor
    cross: torch.Tensor | None = None

    @classmethod
    def by_fold(cls, found: Iterable[tuple[Batch, torch.Tensor, torch.Tensor | None]]) -> list[Moments]:
        """Moments of each fold; the batches of a fold must be consecutive."""
        return [cls.of(part) for _, part in groupby(found, key=lambda one: one[0].fold)]

    @classmethod
    def total(cls, folds: Sequence[Moments]) -> Moments:
        """The sum of `folds`."""
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
