"""Hidden states of the calibration tokens as they pass through the layers, and the sums that calibration takes over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from qembed.checkpoint.head import Head
from qembed.quantize import products
from qembed.quantize.batches import Batch
from qembed.quantize.blocks import DecoderLayer, rms_norm
from qembed.quantize.states import StoredStates

if TYPE_CHECKING:
    import torch

    from qembed.quantize.table import Rows


States: TypeAlias = "list[torch.Tensor] | StoredStates"
"""States [B, L, d] of each batch, read and written by the batch's index as float32 on the CPU."""
PANEL_COLUMNS = 512
"""Number of columns of a Gram matrix that are summed at a time. Entries above a panel's diagonal are mirrored, not computed."""


@dataclass
class Stream:
    """Hidden states [B, L, hidden] float32 of the tokens of `batches`, on their way through the layers.

    Attributes:
        batches: the tokens.
        hidden: the states of each batch, on the CPU.
        in_half: whether the states, and inputs of linear layers, are stored in 16 bits.
    """

    batches: list[Batch]
    hidden: States
    in_half: bool = False

    @classmethod
    def start(cls, rows: torch.Tensor | Rows, batches: list[Batch], in_half: bool = False) -> Stream:
        """Look up the ids of `batches` in the token table [vocabulary, hidden], or in a subset of its `rows`."""
        stream = cls(batches, [], in_half)
        stream.hidden = stream._stored(rows[batch.ids].float() for batch in batches)
        return stream

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Pairs (batch, hidden states)."""
        return zip(self.batches, self.hidden, strict=True)

    def advance(self, block: DecoderLayer) -> States:
        """Run every batch through the layer that `block` holds; returns the hidden states after its attention."""
        import torch

        with torch.no_grad():
            self.hidden = self._after("self_attn.o_proj", block)
            middle, self.hidden = self.hidden, self._after("mlp.down_proj", block)
        return middle

    def inputs_of(self, name: str, block: DecoderLayer) -> States:
        """The inputs [B, L, K] of "self_attn.o_proj" or "mlp.down_proj" for each batch."""
        return self._stored((block.inputs_of(name, hidden.to(block.device), batch) for batch, hidden in self), inputs=True)

    def plus_output(self, name: str, block: DecoderLayer, inputs: States) -> States:
        """The hidden states plus the output of the loaded linear layer `name` for its `inputs`."""
        pairs = zip(self.hidden, inputs, strict=True)
        return self._stored(block.add_output(name, hidden.to(block.device), x.to(block.device)) for hidden, x in pairs)

    def outputs(self, weight: torch.Tensor, epsilon: float, head: Head) -> torch.Tensor:
        """What `head` makes of the texts [texts, width], without their prefixes, behind the final norm with `weight`.

        They are of any length, in the order of the batches.
        """
        import torch

        pooled = [head.pool(rms_norm(hidden, weight, epsilon), batch.ends.to(hidden.device) + 1) for batch, hidden in self]
        return head.project(torch.cat(pooled))

    def vectors(self, weight: torch.Tensor, epsilon: float, head: Head) -> torch.Tensor:
        """Unit vectors [texts, width] of the texts: `outputs`, scaled to unit length."""
        return unit_length(self.outputs(weight, epsilon, head))

    def _after(self, name: str, block: DecoderLayer) -> States:
        """The hidden states after the linear layer `name`, whose inputs are rounded as those that `inputs_of` stores."""

        def states() -> Iterator[torch.Tensor]:
            for batch, hidden in self:
                inputs = block.inputs_of(name, hidden.to(block.device), batch)
                inputs = inputs.bfloat16() if self.in_half else inputs
                yield block.add_output(name, hidden.to(block.device), inputs)

        return self._stored(states())

    def _stored(self, states: Iterable[torch.Tensor], *, inputs: bool = False) -> States:
        """Store `states`: those of the residual stream, or `inputs` of a linear layer."""
        if not self.in_half:
            return [tensor.to("cpu").float() for tensor in states]
        stored: StoredStates | None = None
        for number, tensor in enumerate(states):
            stored = StoredStates(self.batches, tensor.shape[-1], inputs=inputs) if stored is None else stored
            stored[number] = tensor
        return stored if stored is not None else []


def unit_length(vectors: torch.Tensor) -> torch.Tensor:
    """`vectors` [n, width] scaled to unit length."""
    import torch

    return torch.nn.functional.normalize(vectors, dim=-1)


def text_vectors(hidden: torch.Tensor, batch: Batch, weight: torch.Tensor, epsilon: float, head: Head) -> torch.Tensor:
    """Vectors [n, width] of any length of the texts of `batch`, and of their prefixes if the last token's state is the vector.

    `hidden` [B, L, hidden] are the states after the last layer, `weight` [hidden] is that of the final norm.
    """
    if head.pooling == "last":
        return head.project(rms_norm(hidden[batch.last.to(hidden.device)], weight, epsilon))
    return head.project(head.pool(rms_norm(hidden, weight, epsilon), batch.ends.to(hidden.device) + 1))


@dataclass
class OriginalStates:
    """Hidden states [B, L, hidden] of each batch in the original model: before a layer, after its attention, and after it.

    The first two are dropped as soon as they are no longer needed.
    """

    before: States | None
    middle: States | None
    after: States


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
    def merge(cls, folds: list[Moments]) -> Moments:
        """The sums over all `folds`, in the memory of the first. Empties the list."""
        first = folds.pop(0)
        while folds:
            other = folds.pop()
            first.gram += other.gram
            if first.cross is not None and other.cross is not None:
                first.cross += other.cross
        return first

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Moments:
        """Sum over `samples`."""
        gram: torch.Tensor | None = None
        cross: torch.Tensor | None = None
        for batch, inputs, difference in samples:
            x = inputs.flatten(0, 1).T.contiguous()  # see `products.add_sum`
            weighted = x * batch.weight.to(x.device).view(1, -1)  # 0 for padding
            width = len(x)
            gram = x.new_zeros(width, width) if gram is None else gram
            with products.in_bfloat16(x.device):
                for start in range(0, width, PANEL_COLUMNS):
                    end = start + PANEL_COLUMNS
                    products.add_sum(gram[start:, start:end], x[start:], weighted[start:end])
                if difference is not None:
                    cross = x.new_zeros(difference.shape[-1], width) if cross is None else cross
                    products.add_sum(cross, difference.flatten(0, 1).T.contiguous(), weighted)
        if gram is None:
            raise ValueError("no batches")
        _mirror(gram)
        return cls(gram, cross)


def _mirror(gram: torch.Tensor) -> None:
    """Make `gram` [K, K] symmetric, of which only what is on and below the diagonal blocks of PANEL_COLUMNS was summed."""
    for start in range(0, len(gram), PANEL_COLUMNS):
        end = start + PANEL_COLUMNS
        block = gram[start:end, start:end]
        block.copy_(block.tril() + block.tril(-1).T)
        gram[start:end, end:] = gram[end:, start:end].T
