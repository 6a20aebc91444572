"""Hidden states in 16 bits while they wait: those of tens of thousands of tokens are most of a run's memory.

Each set of states is one block of memory, which the system gets back as a whole; tensors of a few megabytes each would lie
between those that are used for a moment, and keep the heap large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from qembed.quantize.batches import Batch

LARGEST_EXPONENT = 15
"""Stored numbers are below 2^15, which leaves a bit of float16's range free."""


class StoredStates:
    """States of each batch, stored in 16 bits; read and written by the batch's index as float32 [B, L, d] on the CPU.

    The residual stream is stored in float16 relative to each token's largest number, because a token's numbers can exceed
    float16's range ("massive activations", Sun et al. 2024, https://arxiv.org/abs/2402.17762). The rounding, 2^-12, is far
    below what INT4 weights change in a layer. Inputs of linear layers are stored in bfloat16, to which their products round
    them anyway where the CPU multiplies bfloat16 (`products.in_bfloat16`); division by powers of two commutes with storing.
    """

    def __init__(self, batches: Sequence[Batch], width: int, *, inputs: bool = False) -> None:
        """Allocate `width` numbers for each token of `batches`: the residual stream, or the `inputs` of a linear layer."""
        import torch

        shapes = [tuple(batch.ids.shape) for batch in batches]
        tokens = sum(rows * columns for rows, columns in shapes)
        values = torch.empty(tokens, width, dtype=torch.bfloat16 if inputs else torch.float16)
        scales = torch.ones(tokens, 1)
        sizes = [rows * columns for rows, columns in shapes]
        self._values = [part.view(*shape, width) for part, shape in zip(values.split(sizes), shapes, strict=True)]
        self._scales = [part.view(*shape, 1) for part, shape in zip(scales.split(sizes), shapes, strict=True)]
        self._scaled = not inputs

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._values)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The states of the batch at `index`."""
        states = self._values[index].float()
        return states.mul_(self._scales[index]) if self._scaled else states

    def __setitem__(self, index: int, states: torch.Tensor) -> None:
        """Store the `states` of the batch at `index`."""
        import torch

        states = states.to("cpu")
        if self._scaled:
            exponents = states.abs().amax(-1, keepdim=True).frexp().exponent - LARGEST_EXPONENT
            scales = self._scales[index].copy_(torch.ldexp(torch.ones(exponents.shape), exponents))
            states = states / scales
        self._values[index].copy_(states)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The states of each batch."""
        return (self[index] for index in range(len(self)))
