"""Matrix products in float32, by the faster of PyTorch's two libraries for CPUs.

PyTorch uses MKL for float32 products, which is limited to AVX2 on CPUs that are not Intel's. On such CPUs with AVX-512 oneDNN
takes half the time; on Intel's both take the same. The choice depends on the CPU alone, so the same machine gives the same
bits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROWS = 256
"""Rows that oneDNN multiplies at a time."""


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left` [M, K] · `right` [K, N]: [M, N]. Not differentiable."""
    return linear(left, right.T)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] · `weight`ᵀ [N, K] + `bias` [N]: [..., N]. Differentiable where gradients are enabled."""
    import torch

    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or not _has_onednn():
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    # For a weight that is not contiguous oneDNN falls back to its slow reference code.
    weight = weight.contiguous()
    result = rows.new_empty(len(rows), len(weight))
    for part, out in zip(rows.split(ROWS), result.split(ROWS), strict=True):
        # oneDNN caches a buffer per shape, fragmenting the heap: pad to few shapes.
        padded = part if len(part) in (ROWS, len(rows)) else torch.nn.functional.pad(part, (0, 0, 0, ROWS - len(part)))
        out.copy_(torch.ops.mkldnn._linear_pointwise(padded.contiguous(), weight, bias, "none", [], "")[: len(part)])
    return result.unflatten(0, x.shape[:-1])


def use_in(module: torch.nn.Module) -> None:
    """Make the `nn.Linear`s of `module` compute with `linear` of this file."""
    from torch import nn

    class Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.weight, self.bias)

    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear


@cache
def _has_onednn() -> bool:
    import torch

    operators: Any = torch.ops.mkldnn
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return fast and hasattr(operators, "_linear_pointwise")
