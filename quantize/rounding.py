"""GPTQ rounding (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) onto a grid that AWQ chose.

Columns are rounded one after another; the error of each is compensated by the columns not yet rounded, so that the layer's
output changes least. The grid is fixed beforehand, so columns can go in any order: by falling mean square of the input (GPTQ's
act_order). The AWQ layout permits that, because a column keeps the group of its position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qembed.quantize.awq import LEVELS, Grid
from qembed.quantize.products import linear, matmul

if TYPE_CHECKING:
    import torch

BLOCK = 128
DAMPING = 0.1
"""Share of the Gram matrix's mean diagonal (GPTQ's percdamp). The usual 0.01 is slightly better on texts like the calibration
texts and worse on others: on SmolLM2 0.1 had the lowest KL divergence of 0.01, 0.1 and 0.2."""
SMALLEST_DIAGONAL = 1e-20
SMALL_TRIANGLE = 256
PASSES = 2
"""Rounds of GPTQ and refitted scales. Each gains about half as much as the one before."""
REFITTED = 1024
"""Outputs per batch of linear systems."""
REFIT_DAMPING = 1e-3
"""Share of the mean diagonal of a row's system, which is singular if all levels of a group are zero."""
PANEL = 512
"""Rows of a triangular matrix multiplied at a time."""


@dataclass(frozen=True)
class Inverse:
    """Factored inverse of a damped Gram matrix.

    Attributes:
        order: channels [K] int64 in the order of rounding, by falling mean square of the input.
        upper: upper triangular U [K, K] float32 with UᵀU = (G + λI)⁻¹, rows and columns in `order`.
    """

    order: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float = DAMPING) -> Inverse:
        """Factor in float64, with λ = `damping` · mean diagonal of G."""
        order = gram.diagonal().argsort(descending=True, stable=True)
        return cls(order, inverse_factor(gram, damping, order))

    def scaled(self, scales: torch.Tensor) -> Inverse:
        """The inverse for inputs divided by `scales` [K]: G⁻¹ is multiplied by them from both sides."""
        return Inverse(self.order, self.upper * scales[self.order])

    def least_squares(self, cross: torch.Tensor) -> torch.Tensor:
        """`cross` · (G + λI)⁻¹ [N, K]: the matrix A that minimizes Σ ‖d − A x‖² + λ ‖A‖², given `cross` = Σ d xᵀ [N, K].

        If x comes from quantized layers and d is the output missing relative to the original model, W + A undoes the part of
        the earlier layers' errors that is a linear function of x (compare GPTAQ, Li et al. 2025,
        https://arxiv.org/abs/2504.02692).
        """
        import torch

        found, half_way = torch.empty_like(cross), torch.empty_like(cross)
        ordered = cross[:, self.order]
        panels = [slice(start, start + PANEL) for start in range(0, cross.shape[1], PANEL)]
        for panel in panels:  # everything left of the diagonal is zero
            half_way[:, panel] = linear(ordered[:, panel.start :], self.upper[panel, panel.start :])
        for panel in panels:
            found[:, self.order[panel]] = matmul(half_way[:, : panel.stop], self.upper[: panel.stop, panel])
        return found

    def remaining_variance(self) -> torch.Tensor:
        """Cost [K] of a squared rounding error of each channel after compensation by the channels rounded later.

        It is 1/U_kk²: the variance of the channel's input that later channels do not explain.
        """
        import torch

        found = torch.empty_like(self.upper.diagonal())
        found[self.order] = self.upper.diagonal().square().reciprocal()
        return found


def rounded(weight: torch.Tensor, gram: torch.Tensor, inverse: Inverse, grid: Grid) -> tuple[torch.Tensor, Grid]:
    """Alternate GPTQ and optimal scales, PASSES times; returns levels 0…15 [N, K] float32 and their grid.

    The initial grid is chosen without compensation in mind. Given the levels, other scales lose less, and given those, other
    levels (alternating minimization, as in LNQ of GuidedQuant, Kim et al. 2025, https://arxiv.org/abs/2505.07004,
    there with free codebooks).

    Args:
        weight: [N, K], to round.
        gram: [K, K] of its inputs.
        inverse: of `gram`.
        grid: initial grid.
    """
    for _ in range(PASSES):
        levels = gptq(weight, inverse, grid)
        grid = refitted(weight, levels, grid, gram)
    return levels, grid


def gptq(weight: torch.Tensor, inverse: Inverse, grid: Grid) -> torch.Tensor:
    """GPTQ: levels 0…15 [N, K] float32 for `weight` [N, K] on `grid` that make tr(ΔW · G · ΔWᵀ) small."""
    import torch

    factor, diagonal = inverse.upper, inverse.upper.diagonal().tolist()
    groups = inverse.order // grid.group_size
    # Transposed, so that each step reads contiguous rows.
    scale, zero_point = grid.scale.T.contiguous(), grid.zero_point.T.contiguous()
    scales, least, most = scale.unbind(), (-zero_point).unbind(), (LEVELS - zero_point).unbind()
    rest = weight.T[inverse.order]
    steps = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        end = min(start + BLOCK, len(rest))
        block, errors = rest[start:end], torch.empty_like(rest[start:end])
        rows = zip(groups[start:end].tolist(), block.unbind(), steps[start:end].unbind(), errors.unbind(), strict=True)
        for at, (group, value, step, error) in enumerate(rows, start):
            torch.div(value, scales[group], out=step).round_().clamp_(least[group], most[group])
            torch.sub(value, step * scales[group], out=error).div_(diagonal[at])
            block[at + 1 - start :].addr_(factor[at, at + 1 : end], error, alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        steps[start:end] += zero_point[groups[start:end]]
    return steps[inverse.order.argsort()].T.contiguous()


def refitted(weight: torch.Tensor, levels: torch.Tensor, grid: Grid, gram: torch.Tensor) -> Grid:
    """`grid` with the scales that minimize tr(ΔW · (G + λI) · ΔWᵀ) for the given `levels` [N, K], in closed form.

    The levels are fixed, so each row of the weight is linear in its K/g scales. λ = DAMPING · mean diagonal of G. A row keeps
    its scales if the new ones are not all positive, or not better once rounded to float16.
    """
    import torch

    size, groups = grid.group_size, grid.scale.shape[1]
    damped = gram + DAMPING * gram.diagonal().mean().clamp(min=SMALLEST_DIAGONAL) * torch.eye(len(gram), device=gram.device)
    scales = []
    for start in range(0, len(weight), REFITTED):
        part = slice(start, start + REFITTED)
        wanted, scale = weight[part], grid.scale[part]
        units = (levels[part].unflatten(1, (groups, size)) - grid.zero_point[part, :, None]).flatten(1)
        square = units.new_empty(len(units), groups, groups)
        along = units.new_empty(len(units), groups)
        for group in range(groups):
            columns = slice(group * size, (group + 1) * size)
            product = matmul(units[:, columns], damped[columns])
            square[:, group] = (product * units).unflatten(1, (groups, size)).sum(-1)
            along[:, group] = (product * wanted).sum(1)
        # In units of the present scales the solution is near the vector of ones and the system well conditioned.
        square, along = square * scale[:, :, None] * scale[:, None], along * scale
        ridge = REFIT_DAMPING * square.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=SMALLEST_DIAGONAL)
        step = torch.eye(groups, device=square.device) * ridge[:, None, None]
        change = torch.linalg.solve((square + step).double(), (along - square.sum(-1)).double()).float()
        found = (scale * (1 + change)).to(torch.float16).float()
        ratio = found / scale - 1
        gain = 2 * (ratio * (along - square.sum(-1))).sum(-1) - torch.einsum("ng,ngh,nh->n", ratio, square, ratio)
        better = (gain > 0) & (found > 0).all(-1) & torch.isfinite(found).all(-1)
        scales.append(torch.where(better[:, None], found, scale))
    return Grid(torch.cat(scales), grid.zero_point, size)


def inverse_factor(gram: torch.Tensor, damping: float, order: torch.Tensor) -> torch.Tensor:
    """Upper triangular U [K, K] float32 with UᵀU = (G + λI)⁻¹, its channels in `order` [K] int64.

    λ = `damping` · mean diagonal of G. Factor the flipped matrix and flip back: gives upper triangular R with RRᵀ = G + λI,
    whose inverse is U. The factorization needs float64. The condition number of R is the square root of the matrix's, which λ
    bounds, so float32 suffices to invert it. If rounding errors make the sum indefinite, λ grows tenfold.
    """
    import torch

    backwards = order.flip(0)
    matrix = gram[backwards][:, backwards].double()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().clamp(min=SMALLEST_DIAGONAL)
    added = 0.0
    while True:
        diagonal.add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            del matrix, diagonal
            return _inverse(lower.float()).flip(0, 1)
        damping *= 10


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    """Inverse of a lower triangular matrix [K, K], by halves: a third of the work of solving for the unit matrix."""
    import torch

    size = len(lower)
    if size <= SMALL_TRIANGLE:
        unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, unit, upper=False)
    half = size // 2
    made = torch.zeros_like(lower)
    made[:half, :half] = _inverse(lower[:half, :half])
    made[half:, half:] = _inverse(lower[half:, half:])
    made[half:, :half] = matmul(made[half:, half:], matmul(lower[half:, :half], made[:half, :half]).neg_())
    return made
