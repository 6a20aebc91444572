"""Matrix products in float32, by the faster of PyTorch's two CPU libraries: oneDNN or MKL.

PyTorch computes float32 products with MKL, which uses only AVX2 on CPUs that are not Intel's. On such CPUs with AVX-512, oneDNN
takes half the time; on other CPUs with AVX-512 it is as fast as MKL. Compiled models use it too. The choice depends only on the
CPU, so the same machine computes the same bits.

Products that only sum over calibration tokens may be less exact than those of weights and matrices: see `in_bfloat16`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BFLOAT16 = "bf16"
"""torch's name of the precision."""
ROWS = 64
"""Rows are padded to a multiple of this number: oneDNN caches a buffer for each shape, which fragments the heap."""


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left` [M, K] · `right` [K, N]: [M, N]. Not differentiable."""
    return linear(left, right.T)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] · `weight`ᵀ [N, K] + `bias` [N]: [..., N]. Differentiable if gradients are enabled."""
    import torch

    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype == torch.float64 or not _has_onednn():
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    count = len(rows)
    weight = weight.contiguous()  # oneDNN falls back to its slow reference code for other layouts
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % ROWS)) if count % ROWS else rows.contiguous()
    products = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return products[:count].unflatten(0, x.shape[:-1])


def add_sum(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left` [M, T] · `right`ᵀ [T, N], a sum over T tokens, to `total` [M, N]. Not differentiable.

    Fastest if each channel's tokens are contiguous.
    """
    if _precision() == BFLOAT16:
        total.addmm_(left, right.T)  # oneDNN, for any layout
    else:
        total += linear(left, right)


def calibration_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which layers compute the calibration's states: bfloat16 where the CPU multiplies it, otherwise float32.

    Both the original and the quantized model are computed in it. The rounding, 0.2% of a number, is far below the error of INT4
    weights, and unlike that error it averages out over tokens.
    """
    import torch

    return torch.bfloat16 if device.type == "cpu" and _multiplies_bfloat16() else torch.float32


@contextmanager
def in_bfloat16(device: torch.device) -> Iterator[None]:
    """Let products in the `with` block round their factors to bfloat16, where the CPU multiplies these several times as fast.

    Sums stay in float32: see `calibration_dtype` for why the rounding is harmless.
    """
    import torch

    if device.type != "cpu" or not _multiplies_bfloat16():
        yield
        return
    mkldnn: Any = torch.backends.mkldnn
    settings = mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = BFLOAT16
    try:
        yield
    finally:
        settings.fp32_precision = before


def use_in(module: torch.nn.Module) -> None:
    """Make the linear layers of `module` compute with `linear`."""
    from torch import nn

    class Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.weight, self.bias)

    for submodule in module.modules():
        if type(submodule) is nn.Linear:
            submodule.__class__ = Linear


@cache
def _has_onednn() -> bool:
    """Whether the CPU has AVX-512, and PyTorch oneDNN with the operator that `linear` calls."""
    import torch

    operators: Any = torch.ops.mkldnn
    supported = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return supported and hasattr(operators, "_linear_pointwise")


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, and torch can let oneDNN do so with float32 factors."""
    import torch

    from qembed.vllm.kernels import this_cpu

    return _has_onednn() and this_cpu().has_bfloat16 and hasattr(torch.backends.mkldnn, "matmul")


def _precision() -> str:
    import torch

    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(settings, "fp32_precision", "none")
