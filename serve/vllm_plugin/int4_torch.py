"""The INT4 linear layer in torch, as functions of tensors: used where int4_native.py has no compiled kernel.

Weights stay 4-bit in memory. A product dequantizes a block of output rows to float32 into a scratch buffer that fits the
cache, multiplies it by the float32 GEMM, and overwrites it with the next block. On one core, dequantizing 3 million weights
takes about 1 ms whatever the number of rows; the product takes 4 ms with 43 rows and 25 ms with 344.

Layout: byte j of a group of g inputs holds input j of the group in its low nibble and input j + g/2 in its high nibble, so
both nibbles are unpacked to contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qembed.checkpoint import awq_layout

SCRATCH_BYTES = 4 * 2**20
BLOCK_OUTPUTS = 1024
"""Outputs that are unpacked to a byte per weight at once while a layer is prepared."""

ReadRows = Callable[[int, int], torch.Tensor]
"""`read_rows(start, end)`: the integers 0…15 of outputs `start` to `end` (exclusive), [end − start, K] uint8."""


class Weight(NamedTuple):
    """A linear layer of K inputs and N outputs in groups of g inputs.

    `values` [N, K/2] uint8 in the layout above, `scales` [N, K/g] float16 or float32, `zeros` [N, K/g] int8.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def prepare(read_rows: ReadRows, scales: torch.Tensor, zeros: torch.Tensor) -> Weight:
    """Pack a layer from its integers (`read_rows`) and its `scales` and `zeros` [N, K/g]."""
    outputs, groups = scales.shape
    blocks = []
    for start in range(0, outputs, BLOCK_OUTPUTS):
        low, high = read_rows(start, min(start + BLOCK_OUTPUTS, outputs)).unflatten(1, (groups, -1)).chunk(2, dim=-1)
        blocks.append((low | high << 4).flatten(1))
    return Weight(torch.cat(blocks), narrow(scales).contiguous(), zeros.to(torch.int8).contiguous())


def narrow(scales: torch.Tensor) -> torch.Tensor:
    """`scales` in float16 if that is exact, else float32. vLLM converts a checkpoint's float16 scales to the model's dtype."""
    half = scales.to(torch.float16)
    return half if torch.equal(half.to(scales.dtype), scales) else scales.float()


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 [rows, columns] to the integers 0…15 [rows, 8 · columns] uint8, the lowest nibble first."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Unpack AWQ's int32 [rows, columns] (`awq_layout`) to the integers 0…15 [8 · columns, rows] uint8: outputs first."""
    nibbles = unpack(words).unflatten(1, (-1, awq_layout.PACK))
    return nibbles[..., sorted(range(awq_layout.PACK), key=awq_layout.ORDER.__getitem__)].flatten(1).T


def dequantize(weight: Weight, out: torch.Tensor) -> torch.Tensor:
    """Write the dequantized `weight` into `out` [N, K] float32, and return it."""
    rows, groups = weight.scales.shape
    packed = weight.values.view(rows, groups, -1)
    halves = out.view(rows, groups, 2, packed.shape[-1])
    zeros = weight.zeros[..., None]
    halves[:, :, 0].copy_((packed & 15).view(torch.int8).sub_(zeros))
    halves[:, :, 1].copy_((packed >> 4).view(torch.int8).sub_(zeros))
    out.view(rows, groups, -1).mul_(weight.scales.float()[..., None])
    return out


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` [M, K] times the transposed weight, plus `bias` [N]: [M, N] in the dtype of `x`, computed in float32."""
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


# As a custom operator, so that torch.compile does not unroll the loop over blocks into its graph.
_LIBRARY = torch.library.Library("qembed", "DEF")
_LIBRARY.define("int4_linear(Tensor x, Tensor values, Tensor scales, Tensor zeros, Tensor? bias) -> Tensor")
_LIBRARY.impl("int4_linear", _operator, "CPU")
torch.library.register_fake("qembed::int4_linear", _shape, lib=_LIBRARY)
