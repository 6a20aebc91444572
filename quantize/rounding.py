"""Error-compensated rounding (GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323) onto a grid that AWQ chose.

Columns are rounded one after another, and the error of each is pushed into those not yet rounded so that the layer's output
moves least. The grid is fixed beforehand, so columns may go in any order: greatest activation first ("activation order"), which
the AWQ layout permits because a column's group stays what its position says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qembed.quantize.awq import LEVELS, Grid

if TYPE_CHECKING:
    import torch

BLOCK = 128
DAMPING = 0.01


def compensated(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, damping: float = DAMPING) -> torch.Tensor:
    """Levels 0…15 [N, K] float32 for `weight` [N, K] on `grid`, chosen so that tr(ΔW · G · ΔWᵀ) is small.

    The Cholesky factor is taken in float64; `damping` is the share of G's mean diagonal that is added to its diagonal.
    """
    import torch

    order = gram.diagonal().argsort(descending=True)
    factor = inverse_factor(gram[order][:, order], damping)
    groups = order // grid.group_size
    scale, zero_point = grid.scale[:, groups], grid.zero_point[:, groups]
    rest = weight[:, order].clone()
    levels = torch.empty_like(rest)
    for start in range(0, rest.shape[1], BLOCK):
        end = min(start + BLOCK, rest.shape[1])
        block, errors = rest[:, start:end], torch.empty_like(rest[:, start:end])
        for column in range(end - start):
            at = start + column
            value = block[:, column]
            level = ((value / scale[:, at]).round_() + zero_point[:, at]).clamp_(0, LEVELS)
            levels[:, at] = level
            error = (value - (level - zero_point[:, at]) * scale[:, at]) / factor[at, at]
            block[:, column:] -= error[:, None] * factor[at, at:end]
            errors[:, column] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    return levels[:, order.argsort()]


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U [K, K] float32 with UᵀU = (G + λI)⁻¹, λ the share `damping` of G's mean diagonal.

    Channels that were always zero get a diagonal of their own. Where rounding errors leave the sum indefinite, λ grows tenfold.
    """
    import torch

    matrix = gram.double()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny)
    share = damping
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        share *= 10
