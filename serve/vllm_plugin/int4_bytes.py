"""The INT4 linear layer by bytes, for CPUs with AVX-512 VNNI or AMX.

int4_bytes.h describes the layout, int4_bytes.cpp the algorithm.

It is in the same compiled library as the kernel for AVX2 (int4_native.py), and has the same arguments. Weights are packed
differently, so a layer is prepared by one or the other.
"""

from __future__ import annotations

import ctypes
import functools
import os
from enum import IntFlag

import torch

from qembed.native import gomp_parallel
from qembed.serve.vllm_plugin import int4_native
from qembed.serve.vllm_plugin.int4_native import DTYPES, MAX_CHUNK, PANEL, Weight
from qembed.serve.vllm_plugin.int4_torch import BLOCK_OUTPUTS, ReadRows, narrow
from qembed.vllm.kernels import CAPABILITY_LIMIT

INPUTS = 8
"""Inputs whose 4-bit weights of a panel are packed into 64 bytes."""
DIGITS = 2
"""Bytes of an activation: two make 16-bit integers, an error of about 3e-5 of a row."""


class Instructions(IntFlag):
    """The instruction sets that the kernel is compiled for."""

    VNNI = 1
    AMX = 2


@functools.cache
def instructions() -> Instructions | None:
    """The fastest that this CPU has; None if it has none, or ATEN_CPU_CAPABILITY limits torch, and so the plugin, to AVX2."""
    library = int4_native.library()
    if library is None or os.environ.get(CAPABILITY_LIMIT, "") in ("default", "avx2"):
        return None
    supported = Instructions(library.qembed_int4_bytes_supported())
    return next((instruction for instruction in (Instructions.AMX, Instructions.VNNI) if instruction in supported), None)


@functools.cache
def _multiply() -> ctypes._NamedFuncPointer:
    library = int4_native.library()
    assert library is not None
    library.qembed_int4_bytes_supported()  # asks Linux for AMX
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    multiply = library.qembed_int4_bytes_linear
    multiply.restype = integer
    multiply.argtypes = [
        *(pointer, pointer, integer, ctypes.c_int64, integer, integer, integer, integer),
        *(pointer, pointer, integer, pointer, pointer, pointer, integer, integer, integer),
    ]
    return multiply


def chunk_of(group: int) -> int | None:
    """Inputs that share a step of the activations: the largest multiple of 8 up to 128 that divides `group`, or None."""
    return next((size for size in range(MAX_CHUNK, 0, -INPUTS) if group % size == 0), None)


def prepare(read_rows: ReadRows, scales: torch.Tensor, zeros: torch.Tensor, inputs: int) -> Weight:
    """Pack a layer of K = `inputs`, as `int4_native.prepare`. `values` is [P, K/8, 64] uint8 in the layout of int4_bytes.h."""
    outputs = scales.shape[0]
    values = torch.empty(-(-outputs // PANEL), inputs // INPUTS, 4 * PANEL, dtype=torch.uint8)
    for start in range(0, outputs, BLOCK_OUTPUTS):
        block = int4_native.panels(read_rows(start, min(start + BLOCK_OUTPUTS, outputs)))
        halves = block.unflatten(2, (-1, 2, INPUTS // 2))  # [panel, output, eight inputs, half of them, input]
        pairs = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
        values[start // PANEL :][: len(block)] = pairs.permute(0, 2, 1, 3).flatten(2)
    return Weight(values, int4_native.by_group(narrow(scales)), int4_native.by_group(zeros.to(torch.uint8)))


def linear(
    x: torch.Tensor,
    weight: Weight,
    outputs: int,
    bias: torch.Tensor | None,
    *,
    digits: int = DIGITS,
    instruction: Instructions | None = None,
) -> torch.Tensor:
    """`x` [M, K] times the transposed weight, plus `bias` [N]: [M, N] in the dtype of `x`, accumulated in float32.

    `digits` bytes of activations, 1 or 2. `instruction` is one of `Instructions`; None is the fastest. All give the same bits.

    Raises:
        MemoryError: the integers of the activations cannot be allocated.
    """
    inputs = x.contiguous()
    result = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    group = x.shape[1] // weight.scales.shape[1]
    float_bias = None if bias is None else bias.float().contiguous()
    failed = _multiply()(
        *(inputs.data_ptr(), result.data_ptr(), DTYPES[x.dtype], *x.shape, outputs, group, chunk_of(group)),
        *(weight.values.data_ptr(), weight.scales.data_ptr(), DTYPES[weight.scales.dtype], weight.zeros.data_ptr()),
        *(None if float_bias is None else float_bias.data_ptr(), gomp_parallel(), torch.get_num_threads()),
        *(digits, instruction or instructions()),
    )
    if failed:
        raise MemoryError("no memory for the activations of an INT4 layer")
    return result


def _operator(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    return linear(x, Weight(values, scales, zeros), outputs, bias)


def _shape(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    del values, scales, zeros, bias
    return x.new_empty(x.shape[0], outputs)


_LIBRARY = torch.library.Library("qembed", "FRAGMENT")
_LIBRARY.define("int4_bytes(Tensor x, Tensor values, Tensor scales, Tensor zeros, Tensor? bias, SymInt outputs) -> Tensor")
_LIBRARY.impl("int4_bytes", _operator, "CPU")
torch.library.register_fake("qembed::int4_bytes", _shape, lib=_LIBRARY)
