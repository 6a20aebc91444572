"""Error-compensated rounding (GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323) onto a grid that AWQ chose.

Columns are rounded one after another, and the error of each is pushed into those not yet rounded so that the layer's output
moves least. The grid is fixed beforehand, so columns may go in any order: greatest activation first ("activation order"), which
the AWQ layout permits because a column's group stays what its position says.
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
"""Share of the Gram matrix' mean diagonal. GPTQ's customary 0.01 costs a little less on texts like the calibration's and more
on others: on SmolLM2 0.1 had the lowest KL divergence of 0.01, 0.1 and 0.2."""
SMALLEST_DIAGONAL = 1e-20
SMALL_TRIANGLE = 256
PASSES = 2
"""Each later one gains half as much as the one before."""
REFITTED = 1024
"""Outputs whose scales are solved for at a time."""
REFIT_DAMPING = 1e-3
"""Of the mean diagonal of a row's system, which is singular where a group's levels are all zero."""
PANEL = 512
"""Rows of a triangular matrix that are multiplied at a time."""


@dataclass(frozen=True)
class Inverse:
    """The inverse of a damped Gram matrix, factored: all that rounding, refitting and the search for scales ask of it.

    Attributes:
        order: channels [K] int64 by falling mean square of their inputs, in which they are rounded.
        upper: upper triangular U [K, K] float32 with UᵀU = (G + λI)⁻¹, its rows and columns in `order`.
    """

    order: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float = DAMPING) -> Inverse:
        """Factor in float64. λ is the share `damping` of G's mean diagonal."""
        order = gram.diagonal().argsort(descending=True, stable=True)
        return cls(order, inverse_factor(gram, damping, order))

    def scaled(self, scales: torch.Tensor) -> Inverse:
        """That of the inputs divided by `scales` [K]: G⁻¹ is multiplied by them from both sides."""
        return Inverse(self.order, self.upper * scales[self.order])

    def least_squares(self, cross: torch.Tensor) -> torch.Tensor:
        """`cross` · (G + λI)⁻¹ [N, K]: with `cross` = Σ d xᵀ, the matrix that explains d best by x, by damped least squares.

        λ pulls it towards zero. Added to a weight W, where d is what is missing from W x, it gives the weight that maps the
        layer's real inputs nearest to what they should become. Where the inputs come through quantized layers and d is what the
        original model has more, this takes back what of the earlier layers' errors is a linear function of x (compare GPTAQ, Li
        et al. 2025, https://arxiv.org/abs/2504.02692).
        """
        import torch

        found, half_way = torch.empty_like(cross), torch.empty_like(cross)
        ordered = cross[:, self.order]
        panels = [slice(start, start + PANEL) for start in range(0, cross.shape[1], PANEL)]
        for panel in panels:  # what lies left of the diagonal is zero
            half_way[:, panel] = linear(ordered[:, panel.start :], self.upper[panel, panel.start :])
        for panel in panels:
            found[:, self.order[panel]] = matmul(half_way[:, : panel.stop], self.upper[: panel.stop, panel])
        return found

    def remaining_variance(self) -> torch.Tensor:
        """What a squared rounding error of each channel costs [K] once those rounded after it have compensated for it.

        It is 1/U_kk²: the variance of the channel's input that later channels do not explain.
        """
        import torch

        found = torch.empty_like(self.upper.diagonal())
        found[self.order] = self.upper.diagonal().square().reciprocal()
        return found


def rounded(weight: torch.Tensor, gram: torch.Tensor, inverse: Inverse, grid: Grid) -> tuple[torch.Tensor, Grid]:
    """Levels 0…15 [N, K] float32 for `weight` [N, K], and `grid` with scales that suit them: PASSES times one after the other.

    A grid is chosen before rounding, for errors that nothing compensates; with the levels known, other scales lose less, and
    with those other levels (alternating minimisation, as in LNQ of GuidedQuant, Kim et al. 2025,
    https://arxiv.org/abs/2505.07004, there with free codebooks).

    Args:
        weight: what to round.
        gram: of its inputs [K, K].
        inverse: of `gram`.
        grid: to begin with.
    """
    for _ in range(PASSES):
        levels = gptq(weight, inverse, grid)
        grid = refitted(weight, levels, grid, gram)
    return levels, grid


def gptq(weight: torch.Tensor, inverse: Inverse, grid: Grid) -> torch.Tensor:
    """Levels 0…15 [N, K] float32 for `weight` [N, K] on `grid`, chosen so that tr(ΔW · G · ΔWᵀ) is small."""
    import torch

    factor, diagonal = inverse.upper, inverse.upper.diagonal().tolist()
    groups = inverse.order // grid.group_size
    # Rows here are what a step reads: one run of memory.
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
    """`grid` with the scales that suit the chosen `levels` [N, K] best: least tr(ΔW · (G + λI) · ΔWᵀ), solved in closed form.

    The integers stay, so each row's weight is linear in its K/g scales. λ is the share DAMPING of G's mean diagonal. A row
    whose scales would not all be positive, or not be better in float16, keeps those that it has.
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
        # Relative to the scales that there are, the system is near the unit vector and well conditioned.
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

    λ is the share `damping` of G's mean diagonal.

    U is the inverse of the upper triangular R with RRᵀ = G + λI, which the Cholesky factor of the reversed matrix is, reversed.
    That factor needs float64; its condition is but the root of the matrix's, which λ bounds, so float32 inverts it.
    Channels that were always zero get a diagonal of their own. Where rounding errors leave the sum indefinite, λ grows tenfold.
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
    """The inverse of a lower triangular matrix [K, K], by halves: a third of the work of solving for the unit matrix."""
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
