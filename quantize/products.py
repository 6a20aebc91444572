"""Matrix products in float32, by the faster of PyTorch's two CPU libraries: oneDNN or MKL.

PyTorch computes float32 products with MKL, which uses only AVX2 on CPUs that are not Intel's. On such CPUs with AVX-512, oneDNN
takes half the time; on other CPUs with AVX-512 it is as fast as MKL. Compiled models use it too. The choice depends only on the
CPU, so the same machine computes the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BLOCK_ROWS = 256
"""Number of rows that oneDNN multiplies at a time."""


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left` [M, K] · `right` [K, N]: [M, N]. Not differentiable."""
    return linear(left, right.T)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] · `weight`ᵀ [N, K] + `bias` [N]: [..., N]. Differentiable if gradients are enabled."""
    import torch

    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or not _has_onednn():
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    weight = weight.contiguous()  # oneDNN falls back to its slow reference code for other layouts
    products = rows.new_empty(len(rows), len(weight))
    for block, output in zip(rows.split(BLOCK_ROWS), products.split(BLOCK_ROWS), strict=True):
        # oneDNN caches a buffer per shape, fragmenting the heap: pad to few shapes.
        pad = len(block) not in (BLOCK_ROWS, len(rows))
        padded = torch.nn.functional.pad(block, (0, 0, 0, BLOCK_ROWS - len(block))) if pad else block
        output.copy_(torch.ops.mkldnn._linear_pointwise(padded.contiguous(), weight, bias, "none", [], "")[: len(block)])
    return products.unflatten(0, x.shape[:-1])


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
