"""GPTQ rounding (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) onto the grid that AWQ chose.

Rounds the columns one after another, and pushes the error of each into the columns not yet rounded, so that the layer's output
changes least. The grid is fixed beforehand, so the order of the columns is free: largest activation first (GPTQ's act_order).
This fits the AWQ layout, because a column's group follows from its position, not from the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qembed.quantize import triangular
from qembed.quantize.awq import Grid
from qembed.quantize.gptq_block import BLOCK_SIZE, round_block
from qembed.quantize.products import linear, matmul

if TYPE_CHECKING:
    import torch

DAMPING = 0.1
"""λ as a share of the mean diagonal of the Gram matrix: GPTQ's percdamp. The usual 0.01 gives a slightly smaller error on texts
like the calibration texts and a larger one on others: on SmolLM2, 0.1 had the lowest KL divergence of 0.01, 0.1 and 0.2."""
MIN_DIAGONAL = 1e-20
"""Lower bound of a mean diagonal, for inputs that are all zero."""
PASSES = 4
"""Number of times to round and refit the scales. Each further pass gains half as much as the one before."""
REFIT_ROWS = 1024
"""Number of rows whose scales are refitted at a time."""
REFIT_DAMPING = 1e-3
"""Damping as a share of the mean diagonal of a row's system, which is singular if all levels of a group are zero."""
PANEL_SIZE = 512
"""Number of rows or columns of a triangular matrix that are multiplied at a time."""


@dataclass(frozen=True)
class Inverse:
    """The inverse of a damped Gram matrix, factored; used by GPTQ, least squares and the search for scales.

    Attributes:
        order: channels [K] int64 by descending mean square of their inputs; GPTQ rounds them in this order (act_order).
        upper: upper triangular U [K, K] float32 with UᵀU = (G + λI)⁻¹, rows and columns in `order`.
    """

    order: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float = DAMPING) -> Inverse:
        """Factor `gram` [K, K] in float64. λ is `damping` times its mean diagonal (percdamp)."""
        order = gram.diagonal().argsort(descending=True, stable=True)
        return cls(order, inverse_factor(gram, damping, order))

    def scaled(self, scales: torch.Tensor) -> Inverse:
        """The inverse for inputs that are divided by `scales` [K], which multiplies (G + λI)⁻¹ by them from both sides."""
        return Inverse(self.order, self.upper * scales[self.order])

    def least_squares(self, cross: torch.Tensor) -> torch.Tensor:
        """`cross` · (G + λI)⁻¹ [N, K]: with `cross` = Σ d xᵀ, the matrix that predicts d from x by damped least squares.

        λ pulls the result towards zero. If d is the error of W x, W plus the result is the weight whose outputs are closest to
        the correct ones. If x comes through quantized layers and d is what the outputs lack compared with the original model,
        this corrects the part of the earlier layers' errors that is a linear function of x (compare GPTAQ, Li et al. 2025,
        https://arxiv.org/abs/2504.02692).
        """
        import torch

        solution, intermediate = torch.empty_like(cross), torch.empty_like(cross)
        ordered = cross[:, self.order]
        panels = [slice(start, start + PANEL_SIZE) for start in range(0, cross.shape[1], PANEL_SIZE)]
        for panel in panels:  # skips the zeros left of the diagonal
            intermediate[:, panel] = linear(ordered[:, panel.start :], self.upper[panel, panel.start :])
        for panel in panels:
            solution[:, self.order[panel]] = matmul(intermediate[:, : panel.stop], self.upper[: panel.stop, panel])
        return solution

    def remaining_variance(self) -> torch.Tensor:
        """The error [K] that a unit squared rounding error of each channel causes, after the later channels compensate for it.

        It is 1/U_kk²: the variance of the channel's input that later channels do not explain.
        """
        import torch

        variance = torch.empty_like(self.upper.diagonal())
        variance[self.order] = self.upper.diagonal().square().reciprocal()
        return variance


def round_and_refit(weight: torch.Tensor, gram: torch.Tensor, inverse: Inverse, grid: Grid) -> tuple[torch.Tensor, Grid]:
    """Round `weight` [N, K] by GPTQ, then refit the scales to the levels, PASSES times.

    AWQ chooses the grid for errors that are not compensated. Once the levels are known, other scales give a smaller error, and
    those scales other levels (alternating minimization, as in LNQ of GuidedQuant, Kim et al. 2025,
    https://arxiv.org/abs/2505.07004, there with free codebooks).

    Args:
        weight: the weight to round.
        gram: the Gram matrix [K, K] of its inputs.
        inverse: of `gram`.
        grid: the initial grid.

    Returns:
        Levels 0…15 [N, K] float32, and the grid with the refitted scales.
    """
    damped = damp(gram)
    products = linear(weight, damped)
    for _ in range(PASSES):
        levels = gptq(weight, inverse, grid)
        grid = refit_scales(levels, grid, damped, products)
    return levels, grid


def damp(gram: torch.Tensor) -> torch.Tensor:
    """`gram` [K, K] + λI, where λ is DAMPING times its mean diagonal."""
    import torch

    return gram + DAMPING * gram.diagonal().mean().clamp(min=MIN_DIAGONAL) * torch.eye(len(gram), device=gram.device)


def gptq(weight: torch.Tensor, inverse: Inverse, grid: Grid) -> torch.Tensor:
    """Levels 0…15 [N, K] float32 of `weight` [N, K] on `grid` that keep tr(ΔW · G · ΔWᵀ) small."""
    import torch

    groups = inverse.order // grid.group_size
    # Transposed, so that each step reads contiguous memory.
    scales, zero_points = grid.scale.T.contiguous(), grid.zero_point.T.contiguous()
    remaining = weight.T.contiguous().index_select(0, inverse.order)
    levels = torch.empty_like(remaining)
    for start in range(0, len(remaining), BLOCK_SIZE):
        block = slice(start, start + BLOCK_SIZE)
        errors = remaining[block]  # once it is rounded
        round_block(errors, levels[block], inverse.upper[block, block], scales, zero_points, groups[block])
        later = start + len(errors)
        remaining[later:].addmm_(inverse.upper[block, later:].T, errors, alpha=-1)
    return levels.index_select(0, inverse.order.argsort()).T.contiguous()


def refit_scales(levels: torch.Tensor, grid: Grid, damped: torch.Tensor, products: torch.Tensor) -> Grid:
    """`grid` with the scales that minimize tr(ΔW · D · ΔWᵀ) for the given `levels` [N, K], in closed form.

    With fixed levels, a row's weight is linear in its K/g scales. A row keeps its scales if the new ones are not all positive
    and finite, or are no improvement once rounded to float16.

    Args:
        levels: [N, K].
        grid: the scales before.
        damped: D [K, K], the Gram matrix as from `damp`.
        products: W D [N, K] for the weight W.
    """
    import torch

    scales = []
    for start in range(0, len(levels), REFIT_ROWS):
        rows = slice(start, start + REFIT_ROWS)
        matrix, target = _scale_equations(levels[rows], grid.zero_point[rows], grid.group_size, damped, products[rows])
        scales.append(_solve_scales(grid.scale[rows], matrix, target))
    return Grid(torch.cat(scales), grid.zero_point, grid.group_size)


def _scale_equations(
    levels: torch.Tensor, zero_point: torch.Tensor, group_size: int, damped: torch.Tensor, products: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normal equations of each row's scales: matrix [N, K/g, K/g] and right-hand side [N, K/g].

    Args:
        levels: [N, K].
        zero_point: [N, K/g].
        group_size: g.
        damped: D [K, K].
        products: W D [N, K].
    """
    groups = zero_point.shape[1]
    by_group = levels.unflatten(1, (groups, group_size)) - zero_point[..., None]
    units = by_group.flatten(1)
    matrix = units.new_empty(len(units), groups, groups)
    for group in range(groups):
        start, end = group * group_size, (group + 1) * group_size
        product = linear(units[:, start:end], damped[start:, start:end])  # D is symmetric
        row = product.mul_(units[:, start:]).unflatten(1, (groups - group, group_size)).sum(-1)
        matrix[:, group, group:] = row
        matrix[:, group:, group] = row
    return matrix, (by_group * products.unflatten(1, (groups, group_size))).sum(-1)


def _solve_scales(scale: torch.Tensor, matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The solution of the normal equations for each row [N, K/g], rounded to float16; `scale` where that is no improvement.

    Works in units of `scale`: the solution is then close to a vector of ones, and the system well conditioned.
    """
    import torch

    matrix, target = matrix * scale[:, :, None] * scale[:, None], target * scale
    residual = target - matrix.sum(-1)
    ridge = REFIT_DAMPING * matrix.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=MIN_DIAGONAL)
    damping = torch.eye(matrix.shape[-1], device=matrix.device) * ridge[:, None, None]
    change = torch.linalg.solve((matrix + damping).double(), residual.double()).float()
    refitted = (scale * (1 + change)).to(torch.float16).float()
    change = refitted / scale - 1
    gain = 2 * (change * residual).sum(-1) - torch.einsum("ng,ngh,nh->n", change, matrix, change)
    better = (gain > 0) & (refitted > 0).all(-1) & torch.isfinite(refitted).all(-1)
    return torch.where(better[:, None], refitted, scale)


def inverse_factor(gram: torch.Tensor, damping: float, order: torch.Tensor) -> torch.Tensor:
    """Upper triangular U [K, K] float32 with UᵀU = (G + λI)⁻¹, its channels in `order` [K] int64.

    λ is `damping` times the mean diagonal of G. If rounding errors leave the sum indefinite, λ grows tenfold.

    U is the inverse of the upper triangular R with RRᵀ = G + λI; R is the Cholesky factor of the flipped matrix, flipped back.
    The factorization needs float64. Its result has only the square root of the matrix' condition number, which λ bounds, so
    float32 suffices to invert it. λ also gives channels whose inputs are always zero a positive diagonal.
    """
    backwards = order.flip(0)
    matrix = gram[backwards][:, backwards].double()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().clamp(min=MIN_DIAGONAL)
    added = 0.0
    while True:
        diagonal.add_((damping - added) * mean)
        added = damping
        if triangular.cholesky(factor := matrix.clone()):
            del matrix, diagonal
            return triangular.invert(factor.float()).flip(0, 1)
        damping *= 10
