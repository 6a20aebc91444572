"""Error-compensated rounding (GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323) onto a grid that AWQ chose.

Columns are rounded one after another, and the error of each is pushed into those not yet rounded so that the layer's output
moves least. The grid is fixed beforehand, so columns may go in any order: greatest activation first ("activation order"), which
the AWQ layout permits because a column's group stays what its position says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qembed.quantize.awq import LEVELS, Grid

if TYPE_CHECKING:
    import torch

BLOCK = 128
DAMPING = 0.01
SMALLEST_DIAGONAL = 1e-20
SMALL_TRIANGLE = 256


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
        return cls(order, inverse_factor(gram[order][:, order], damping))

    def scaled(self, scales: torch.Tensor) -> Inverse:
        """That of the inputs divided by `scales` [K]: G⁻¹ is multiplied by them from both sides."""
        return Inverse(self.order, self.upper * scales[self.order])

    def solved(self, cross: torch.Tensor) -> torch.Tensor:
        """`cross` · (G + λI)⁻¹ [N, K]: with `cross` = Σ d xᵀ, the matrix that explains d best by x, by damped least squares.

        λ pulls it towards zero. Added to a weight W, where d is what is missing from W x, it gives the weight that maps the
        layer's real inputs nearest to what they should become. Where the inputs come through quantized layers and d is what the
        original model has more, this takes back what of the earlier layers' errors is a linear function of x (compare GPTAQ, Li
        et al. 2025, https://arxiv.org/abs/2504.02692).
        """
        import torch

        found = torch.empty_like(cross)
        found[:, self.order] = (cross[:, self.order] @ self.upper.T) @ self.upper
        return found

    def remaining_variance(self) -> torch.Tensor:
        """What a squared rounding error of each channel costs [K] once those rounded after it have compensated for it.

        It is 1/U_kk²: the variance of the channel's input that later channels do not explain.
        """
        import torch

        found = torch.empty_like(self.upper.diagonal())
        found[self.order] = self.upper.diagonal().square().reciprocal()
        return found


def compensated(weight: torch.Tensor, inverse: Inverse, grid: Grid) -> torch.Tensor:
    """Levels 0…15 [N, K] float32 for `weight` [N, K] on `grid`, chosen so that tr(ΔW · G · ΔWᵀ) is small."""
    import torch

    order, factor = inverse.order, inverse.upper
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


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U [K, K] float32 with UᵀU = (G + λI)⁻¹, λ the share `damping` of G's mean diagonal.

    U is the inverse of the upper triangular R with RRᵀ = G + λI, which the Cholesky factor of the reversed matrix is, reversed.
    Channels that were always zero get a diagonal of their own. Where rounding errors leave the sum indefinite, λ grows tenfold.
    """
    import torch

    matrix = gram.flip(0, 1).double()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().clamp(min=SMALLEST_DIAGONAL)
    added = 0.0
    while True:
        diagonal.add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return _inverse(lower).flip(0, 1).float().contiguous()
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
    made[half:, :half] = made[half:, half:] @ (lower[half:, :half] @ made[:half, :half]).neg_()
    return made
