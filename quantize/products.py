"""Matrix products in float32, by the faster of the two libraries that PyTorch has for them on a CPU.

PyTorch gives float32 products to MKL, which keeps to AVX2 on CPUs that are not Intel's. With AVX-512 oneDNN takes half the time
there (and as long as MKL elsewhere); it is what compiled models use. Which one is taken depends on the CPU alone, so the same
machine gives the same bits.
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
    # What has gaps in memory would be multiplied by code that is there for reference.
    weight = weight.contiguous()
    found = rows.new_empty(len(rows), len(weight))
    for part, into in zip(rows.split(ROWS), found.split(ROWS), strict=True):
        # oneDNN keeps something for each shape, between pieces of memory that are then too small for the next: few shapes.
        whole = part if len(part) in (ROWS, len(rows)) else torch.nn.functional.pad(part, (0, 0, 0, ROWS - len(part)))
        into.copy_(torch.ops.mkldnn._linear_pointwise(whole.contiguous(), weight, bias, "none", [], "")[: len(part)])
    return found.unflatten(0, x.shape[:-1])


def use_in(module: torch.nn.Module) -> None:
    """Have the linears of `module` multiplied by `linear`."""
    from torch import nn

    class Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.weight, self.bias)

    for one in module.modules():
        if type(one) is nn.Linear:
            one.__class__ = Linear


@cache
def _has_onednn() -> bool:
    import torch

    operators: Any = torch.ops.mkldnn
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return fast and hasattr(operators, "_linear_pointwise")
