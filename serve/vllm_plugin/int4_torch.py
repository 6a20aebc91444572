"""The arithmetic of the INT4 linear layer on a CPU, as functions of tensors: where int4_native.py has no compiled kernel.

The weights stay 4-bit in memory. For a product a block of output rows is dequantized in float32 into a scratch buffer that
fits the cache, multiplied by the float32 GEMM, and overwritten by the next block. Dequantizing costs about 1 ms for 3 million
weights on one core, whatever the number of rows, against 4 ms for the product with 43 rows and 25 ms with 344.

Layout: byte j of a group of g inputs holds input j of the group in its low half and input j + g/2 in its high half, so that
both halves are written to contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qembed.checkpoint import awq_layout

SCRATCH_BYTES = 4 * 2**20
BLOCK_OUTPUTS = 1024
"""Outputs that are a byte a weight at once while a layer is prepared."""

ValuesOf = Callable[[int, int], torch.Tensor]
"""Gives the integers 0…15 [end − start, K] uint8 of the outputs from `start` to before `end`."""


class Weight(NamedTuple):
    """A linear layer of K inputs and N outputs in groups of g inputs.

    `values` [N, K/2] uint8 as above, `scales` [N, K/g] float16 or float32, `zeros` [N, K/g] int8.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def prepare(values_of: ValuesOf, scales: torch.Tensor, zeros: torch.Tensor) -> Weight:
    """The layer from its integers, which `values_of` gives, and `scales` and `zeros` [N, K/g]."""
    outputs, groups = scales.shape
    blocks = []
    for start in range(0, outputs, BLOCK_OUTPUTS):
        low, high = values_of(start, min(start + BLOCK_OUTPUTS, outputs)).unflatten(1, (groups, -1)).chunk(2, dim=-1)
        blocks.append((low | high << 4).flatten(1))
    return Weight(torch.cat(blocks), narrow(scales).contiguous(), zeros.to(torch.int8).contiguous())


def narrow(scales: torch.Tensor) -> torch.Tensor:
    """`scales` in float16 where that loses nothing: checkpoints hold float16, and a layer has them in its own dtype."""
    half = scales.to(torch.float16)
    return half if torch.equal(half.to(scales.dtype), scales) else scales.float()


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The integers 0…15 [rows, 8 · columns] uint8 inside int32 [rows, columns], from the low end of each word."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """The integers 0…15 [8 · columns, rows] uint8 inside AWQ's int32 [rows, columns] (`awq_layout`): outputs first."""
    nibbles = unpack(words).unflatten(1, (-1, awq_layout.PACK))
    return nibbles[..., sorted(range(awq_layout.PACK), key=awq_layout.ORDER.__getitem__)].flatten(1).T


def dequantize(weight: Weight, out: torch.Tensor) -> torch.Tensor:
    """Write the rows of `weight` into `out` [N, K] float32, and return it."""
    rows, groups = weight.scales.shape
    packed = weight.values.view(rows, groups, -1)
    halves = out.view(rows, groups, 2, packed.shape[-1])
    zeros = weight.zeros[..., None]
    halves[:, :, 0].copy_((packed & 15).view(torch.int8).sub_(zeros))
    halves[:, :, 1].copy_((packed >> 4).view(torch.int8).sub_(zeros))
    out.view(rows, groups, -1).mul_(weight.scales.float()[..., None])
    return out


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` [M, K] times the weight, plus `bias` [N]: [M, N] in the dtype of `x`. Computed in float32."""
    inputs = x.float()
    outputs, width = weight.values.shape[0], inputs.shape[1]
    block = max(1, min(outputs, SCRATCH_BYTES // (4 * width)))
    scratch = torch.empty(block, width)
    result = torch.empty(inputs.shape[0], outputs)
    for start in range(0, outputs, block):
        part = Weight(*(tensor[start : start + block] for tensor in weight))
        rows = dequantize(part, scratch[: part.values.shape[0]])
        torch.mm(inputs, rows.T, out=result[:, start : start + block])
    if bias is not None:
        result += bias.float()
    return result.to(x.dtype)


def _operator(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return linear(x, Weight(values, scales, zeros), bias)


def _shape(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    del scales, zeros, bias
    return x.new_empty(x.shape[0], values.shape[0])


# An operator of its own keeps torch.compile from unrolling the loop over blocks into its graph.
_LIBRARY = torch.library.Library("qembed", "DEF")
_LIBRARY.define("int4_linear(Tensor x, Tensor values, Tensor scales, Tensor zeros, Tensor? bias) -> Tensor")
_LIBRARY.impl("int4_linear", _operator, "CPU")
torch.library.register_fake("qembed::int4_linear", _shape, lib=_LIBRARY)
