"""The INT4 linear layer by the compiled kernel, for CPUs with AVX2. int4_kernel.cpp describes the algorithm.

The kernel is a shared library with a plain C interface, which the install builds if it finds a C++ compiler. Without it, or
on another CPU, int4_torch.py computes the same in torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import NamedTuple

import torch

from qembed.native import gomp_parallel, load
from qembed.serve.vllm_plugin.int4_torch import BLOCK_OUTPUTS, ReadRows, narrow
from qembed.vllm.kernels import CAPABILITY_LIMIT, LIBRARY

PANEL = 16
MAX_CHUNK = 128
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Weight(NamedTuple):
    """A linear layer of K inputs and N outputs in groups of g inputs, as P = ⌈N / 16⌉ panels of 16 outputs.

    `values` [P, K/4, 32] uint8 in the kernel's layout, `scales` [P, K/g, 16] float16 or float32, `zeros` [P, K/g, 16] uint8.
    Outputs that pad the last panel have scales of zero.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None if it was not built, or if this CPU or this torch cannot run it."""
    kernel = load(LIBRARY)
    try:
        supported = kernel is not None and bool(kernel.qembed_int4_supported())
    except AttributeError:
        return None
    return kernel if supported and gomp_parallel() else None


@functools.cache
def has_vnni() -> bool:
    """Whether to use AVX-VNNI, which is a third faster. ATEN_CPU_CAPABILITY=avx2 disables it, as it limits torch."""
    kernel = library()
    limited = os.environ.get(CAPABILITY_LIMIT, "") in ("default", "avx2")
    return kernel is not None and not limited and kernel.qembed_int4_supported() > 1


@functools.cache
def _multiply() -> ctypes._NamedFuncPointer:
    kernel = library()
    assert kernel is not None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    multiply = kernel.qembed_int4_linear
    multiply.restype = integer
    multiply.argtypes = [
        *(pointer, pointer, integer, ctypes.c_int64, integer, integer, integer, integer),
        *(pointer, pointer, integer, pointer, pointer, pointer, integer, integer),
    ]
    return multiply


def chunk_of(group: int) -> int | None:
    """Inputs that share a step of the 16-bit activations: the largest multiple of 4 up to 128 that divides `group`, or None."""
    return next((size for size in range(MAX_CHUNK, 0, -4) if group % size == 0), None)


def prepare(read_rows: ReadRows, scales: torch.Tensor, zeros: torch.Tensor, inputs: int) -> Weight:
    """Pack a layer of K = `inputs` from its integers (`read_rows`) and its `scales` and `zeros` [N, K/g]."""
    outputs = scales.shape[0]
    values = torch.empty(-(-outputs // PANEL), inputs // 4, 2 * PANEL, dtype=torch.uint8)
    for start in range(0, outputs, BLOCK_OUTPUTS):
        block = panels(read_rows(start, min(start + BLOCK_OUTPUTS, outputs)))
        # [panel, half of the panel, output, four inputs, half of the four, input]. The halves of a panel share a byte.
        split = block.unflatten(2, (-1, 2, 2)).unflatten(1, (2, -1))
        pairs = split[:, 0] | split[:, 1] << 4
        values[start // PANEL :][: len(block)] = pairs.permute(0, 2, 1, 4, 3).flatten(2)
    return Weight(values, by_group(narrow(scales)), by_group(zeros.to(torch.uint8)))


def panels(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [N, columns] as [⌈N / 16⌉, 16, columns], padded with zeros."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL)).unflatten(0, (-1, PANEL))


def by_group(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [N, K/g] as [⌈N / 16⌉, K/g, 16]."""
    return panels(rows).transpose(1, 2).contiguous()


def linear(x: torch.Tensor, weight: Weight, outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` [M, K] times the transposed weight, plus `bias` [N]: [M, N] in the dtype of `x`, accumulated in float32.

    Raises:
        MemoryError: the 16-bit activations cannot be allocated.
    """
    inputs = x.contiguous()
    result = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    group = x.shape[1] // weight.scales.shape[1]
    float_bias = None if bias is None else bias.float().contiguous()
    failed = _multiply()(
        *(inputs.data_ptr(), result.data_ptr(), DTYPES[x.dtype], *x.shape, outputs, group, chunk_of(group)),
        *(weight.values.data_ptr(), weight.scales.data_ptr(), DTYPES[weight.scales.dtype], weight.zeros.data_ptr()),
        *(None if float_bias is None else float_bias.data_ptr(), gomp_parallel(), torch.get_num_threads(), has_vnni()),
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
_LIBRARY.define("int4_panels(Tensor x, Tensor values, Tensor scales, Tensor zeros, Tensor? bias, SymInt outputs) -> Tensor")
_LIBRARY.impl("int4_panels", _operator, "CPU")
torch.library.register_fake("qembed::int4_panels", _shape, lib=_LIBRARY)
