"""Hidden states of the calibration tokens as they pass through the layers, and the sums that calibration takes over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qembed.checkpoint.head import Head
from qembed.quantize.batches import Batch
from qembed.quantize.blocks import DecoderLayer, rms_norm
from qembed.quantize.products import linear

if TYPE_CHECKING:
    import torch

    from qembed.quantize.table import Rows


PANEL_COLUMNS = 512
"""Number of columns of a Gram matrix that are summed at a time. Entries above a panel's diagonal are mirrored, not computed."""


@dataclass
class Stream:
    """Hidden states [B, L, hidden] float32 of the tokens of `batches`, on their way through the layers."""

    batches: list[Batch]
    hidden: list[torch.Tensor]

    @classmethod
    def start(cls, rows: torch.Tensor | Rows, batches: list[Batch]) -> Stream:
        """Look up the ids of `batches` in the token table [vocabulary, hidden], or in a subset of its `rows`."""
        return cls(batches, [rows[batch.ids].float() for batch in batches])

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Pairs (batch, hidden states)."""
        return zip(self.batches, self.hidden, strict=True)

    def advance(self, block: DecoderLayer) -> list[torch.Tensor]:
        """Run every batch through the layer that `block` holds; returns the hidden states after its attention."""
        import torch

        middles = []
        with torch.no_grad():
            for number, (batch, hidden) in enumerate(self):
                middle = block.attend(hidden.to(block.device), batch)
                middles.append(middle.to(hidden.device))
                self.hidden[number] = block.feed_forward(middle).to(hidden.device)
        return middles

    def vectors(self, weight: torch.Tensor, epsilon: float, head: Head) -> torch.Tensor:
        """Unit vectors [texts, width] of the texts, without their prefixes, behind the final norm with `weight` and `head`."""
        import torch

        pooled = [head.pool(rms_norm(hidden, weight, epsilon), batch.ends.to(hidden.device) + 1) for batch, hidden in self]
        return torch.nn.functional.normalize(head.project(torch.cat(pooled)), dim=-1)


def text_vectors(hidden: torch.Tensor, batch: Batch, weight: torch.Tensor, epsilon: float, head: Head) -> torch.Tensor:
    """Vectors [n, width] of any length of the texts of `batch`, and of their prefixes if the last token's state is the vector.

    `hidden` [B, L, hidden] are the states after the last layer, `weight` [hidden] is that of the final norm.
    """
    if head.pooling == "last":
        return head.project(rms_norm(hidden[batch.last.to(hidden.device)], weight, epsilon))
    return head.project(head.pool(rms_norm(hidden, weight, epsilon), batch.ends.to(hidden.device) + 1))


@dataclass
class OriginalStates:
    """Hidden states [B, L, hidden] of each batch in the original model: before a layer, after its attention, and after it."""

    before: list[torch.Tensor]
    middle: list[torch.Tensor]
    after: list[torch.Tensor]


Sample = tuple[Batch, "torch.Tensor", "torch.Tensor | None"]
"""A batch, the inputs x [B, L, K] of a linear layer, and d [B, L, D] (see `Moments.cross`) or None."""


@dataclass
class Moments:
    """Sums over the tokens that a linear layer reads, weighted by `Batch.weight`, in float32.

    Attributes:
        gram: G = Σ x xᵀ [K, K], the Gram matrix of the inputs. GPTQ's Hessian is H = 2 X Xᵀ = 2G.
        cross: Σ d xᵀ [D, K]. q/k/v and gate/up: d = x_original − x. o_proj and down_proj: d = target output, without bias.
    """

    gram: torch.Tensor
    cross: torch.Tensor | None = None

    @classmethod
    def by_fold(cls, samples: Iterable[Sample]) -> list[Moments]:
        """The sums of each fold, as from `of`; the batches of a fold must be consecutive."""
        return [cls.of(fold) for _, fold in groupby(samples, key=lambda sample: sample[0].fold)]

    @classmethod
    def total(cls, folds: Sequence[Moments]) -> Moments:
        """The sums over all `folds`."""
        first, *others = folds
        gram, cross = first.gram, first.cross
        for other in others:
            gram = gram + other.gram
            cross = None if cross is None or other.cross is None else cross + other.cross
        return cls(gram, cross)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Moments:
        """Sum over `samples`."""
        gram: torch.Tensor | None = None
        cross: torch.Tensor | None = None
        for batch, x, difference in samples:
            columns = x.flatten(0, 1).T.contiguous()
            weighted = columns * batch.weight.to(x.device).flatten()  # 0 for padding
            gram = x.new_zeros(x.shape[-1], x.shape[-1]) if gram is None else gram
            for start in range(0, x.shape[-1], PANEL_COLUMNS):
                gram[start:, start : start + PANEL_COLUMNS] += linear(columns[start:], weighted[start : start + PANEL_COLUMNS])
            if difference is not None:
                product = linear(difference.flatten(0, 1).T, weighted)
                cross = product if cross is None else cross.add_(product)
        if gram is None:
            raise ValueError("no batches")
        return cls(gram.tril() + gram.tril(-1).T, cross)
