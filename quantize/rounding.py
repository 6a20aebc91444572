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

    order = activation_order(gram)
    factor = inverse_factor(gram[order][:, order], damping)
    groups = order // grid.group_size
    # A column of these is read at each step: rows make that one run of memory.
    scale, zero_point = grid.scale.T[groups].contiguous(), grid.zero_point.T[groups].contiguous()
    rest = weight.T[order].contiguous()
    levels = torch.empty_like(rest)
    for start in range(0, rest.shape[0], BLOCK):
        end = min(start + BLOCK, rest.shape[0])
        block, errors = rest[start:end], torch.empty_like(rest[start:end])
        for column in range(end - start):
            at = start + column
            value = block[column]
            level = value.div(scale[at]).round_().add_(zero_point[at]).clamp_(0, LEVELS)
            levels[at] = level
            error = value.sub(level.sub_(zero_point[at]).mul_(scale[at])).div_(factor[at, at])
            block[column + 1 :].addr_(factor[at, at + 1 : end], error, alpha=-1)
            errors[column] = error
        rest[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return levels[order.argsort()].T.contiguous()


def activation_order(gram: torch.Tensor) -> torch.Tensor:
    """The channels [K] int64 by falling mean square of their inputs; equal ones keep their order."""
    return gram.diagonal().argsort(descending=True, stable=True)


def remaining_variance(gram: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """What a squared rounding error of each channel costs [K] float32 once those rounded after it have compensated for it.

    It is 1/U_kk² of the factor that `compensated` uses: the variance of the channel's input that later channels do not explain.
    """
    import torch

    order = activation_order(gram)
    found = torch.empty_like(gram.diagonal())
    found[order] = inverse_factor(gram[order][:, order], damping).diagonal().square().reciprocal()
    return found


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U [K, K] float32 with UᵀU = (G + λI)⁻¹, λ the share `damping` of G's mean diagonal."""
    import torch

    while True:
        lower, damping = damped_factor(gram, damping)
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper.float()
        damping *= 10


def damped_factor(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Lower triangular L [K, K] float64 with LLᵀ = G + λI, and the damping that it took.

    λ is the share `damping` of G's mean diagonal, so that channels that were always zero get a diagonal of their own. Where
    rounding errors leave the sum indefinite, λ grows tenfold.
    """
    import torch

    matrix = gram.double()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny)
    added = 0.0
    while True:
        diagonal.add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return lower, damping
        damping *= 10


def refitted(weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The weight [N, K] that maps the layer's real inputs nearest to what they should become, by damped least squares.

    With `cross` = Σ (wanted − W x) xᵀ [N, K] it is W + cross · (G + λI)⁻¹: λ pulls towards `weight`, not to zero. Where the
    inputs come through quantized layers and `wanted` is what the original model has there, this takes back what of the
    earlier layers' errors is a linear function of x (compare GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692).
    """
    import torch

    lower, _ = damped_factor(gram, damping)
    return weight + torch.cholesky_solve(cross.double().T, lower).T.float()
