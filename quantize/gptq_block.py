"""The inner loop of GPTQ: rounds a block of columns one after another, each after the errors of those before it.

On CPUs a compiled function does so (gptq_block.cpp), which the install builds if it finds a C++ compiler. Without it, and on
GPUs, the same operations are calls of torch, most of whose time on a CPU is the calls themselves. Both give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from qembed.native import gomp_parallel, load
from qembed.quantize.awq import MAX_LEVEL

if TYPE_CHECKING:
    import torch

LIBRARY = "qembed.quantize._gptq_block"
"""The module name of the compiled function."""
BLOCK_SIZE = 128
"""Maximum number of columns in a block."""


def round_block(
    values: torch.Tensor,
    levels: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    """Round `values` [C, N] float32 to `levels` 0…15 [C, N], and replace them by their errors divided by `factor`'s diagonal.

    Column c is rounded after U_ic times the error of each column i before it is subtracted. All tensors are contiguous.

    Args:
        values: the columns, transposed so that each is contiguous; at most BLOCK_SIZE of them.
        levels: where to write the levels, as float32.
        factor: U [C, C] upper triangular, the block's part of `rounding.Inverse.upper`; it need not be contiguous.
        scales: the scales of all groups [K/g, N].
        zero_points: the zero points of all groups [K/g, N].
        groups: the group of each column [C] int64.
    """
    if values.device.type == "cpu" and (compiled := _compiled()) is not None:
        _round_compiled(compiled, values, levels, factor, scales, zero_points, groups)
    else:
        round_in_torch(values, levels, factor, scales, zero_points, groups)


def round_in_torch(
    values: torch.Tensor,
    levels: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    """What `round_block` does, on any device."""
    import torch

    lowest, highest = (-zero_points).unbind(), (MAX_LEVEL - zero_points).unbind()
    group_scales, diagonal = scales.unbind(), factor.diagonal().tolist()
    for column, (group, value, level) in enumerate(zip(groups.tolist(), values.unbind(), levels.unbind(), strict=True)):
        torch.div(value, group_scales[group], out=level).round_().clamp_(lowest[group], highest[group])
        value.sub_(level * group_scales[group]).div_(diagonal[column])
        values[column + 1 :] -= factor[column, column + 1 :, None] * value  # not addr_, whose rounding depends on the CPU
    levels += zero_points[groups]


@functools.cache
def _compiled() -> ctypes._NamedFuncPointer | None:
    """The compiled function; None if it was not built."""
    library = load(LIBRARY)
    if library is None:
        return None
    function = library.qembed_gptq_block
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function.restype = integer
    function.argtypes = [pointer, pointer, integer, long, pointer, pointer, pointer, pointer, pointer, integer]
    return function


def _round_compiled(
    function: ctypes._NamedFuncPointer,
    values: torch.Tensor,
    levels: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    import torch

    lower = factor.T.contiguous()
    tensors = (lower, scales, zero_points, groups)
    failed = function(
        *(values.data_ptr(), levels.data_ptr(), *values.shape, *(tensor.data_ptr() for tensor in tensors)),
        *(gomp_parallel(), torch.get_num_threads()),
    )
    if failed:
        raise ValueError(f"{len(values)} columns are more than {BLOCK_SIZE}")
