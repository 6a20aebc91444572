"""Correction of a linear layer towards the original model: least squares, regularized by cross-validation.

Plain least squares uses every direction of the inputs, even those in which a few thousand tokens show little but noise. The
next layer is then fitted to the result, and the overfitting accumulates: on texts and prompts unlike the calibration texts, the
model ends further from the original than without any correction. So the calibration texts are split into two halves. The
solution on each half, for every damping in DAMPINGS, is judged by its gain on the other half. The largest damping whose gain is
within TOLERANCE of the best, with the best strength for it, is then used on both halves together. If there is no gain, the
weight does not change.

The gain of a damping is estimated on JUDGED_OUTPUTS outputs, from a Cholesky factorization of G + λI. Gains rise to a single
maximum in practice, so the search climbs from START_DAMPING instead of trying every damping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from qembed.quantize import triangular
from qembed.quantize.hidden import Moments
from qembed.quantize.products import linear, matmul
from qembed.quantize.rounding import Inverse

if TYPE_CHECKING:
    import torch

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""λ as shares of the mean diagonal of the Gram matrix. For larger λ the solution is a gradient step of length `strength`."""
START_DAMPING = 0.1
"""Where the search for the best of DAMPINGS starts: it is most often the best or next to it."""
JUDGED_OUTPUTS = 256
"""Maximum number of outputs, evenly spaced, by which dampings are judged."""
TOLERANCE = 0.03
"""The chosen damping is the largest whose gain is at most this share below the best. Near the maximum, gains differ by chance,
and a smaller change is safer on texts unlike the calibration texts (compare the one-standard-error rule, Breiman et al. 1984,
Classification and Regression Trees, section 3.4.3)."""
TINY = 1e-30
"""Lower bound of divisors."""


@dataclass(frozen=True)
class Shrinkage:
    """The regularization of a least-squares solution.

    Attributes:
        damping: λ as a share of the mean diagonal of the Gram matrix.
        strength: 0…1, the factor of the solution.
    """

    damping: float
    strength: float


def correct(weight: torch.Tensor, moments: Moments, shrinkage: Shrinkage, behind_norm: bool) -> torch.Tensor:
    """Move `weight` [N, K], whose inputs come from quantized layers, towards the outputs of the original model.

    Args:
        weight: the weights of all linear layers that read the input, stacked.
        moments: of the whole calibration, with `cross`: [K, K] if `behind_norm`, otherwise [N, K].
        shrinkage: how far, from `cross_validate` on the two halves of the calibration.
        behind_norm: whether the input comes from a norm; `Moments.cross` then holds differences of inputs, otherwise target
            outputs.
    """
    if not shrinkage.strength:
        return weight
    inverse = Inverse.of(moments.gram, shrinkage.damping)
    if behind_norm:
        change = matmul(weight, inverse.least_squares(_cross(moments)))
    else:
        change = inverse.least_squares(_residual(weight, moments))
    return weight + shrinkage.strength * change


def cross_validate(weight: torch.Tensor, folds: Sequence[Moments], behind_norm: bool) -> Shrinkage:
    """The largest damping whose gain is within TOLERANCE of the best, and the best strength for it.

    `folds` are the moments of the two halves of the calibration; the other arguments are as in `correct`. The gain of a damping
    is that of either half's solution on the other half, summed.
    """
    unit = float(sum(fold.gram.diagonal().mean() for fold in folds))  # keeps squares within float32
    if len(folds) != 2 or unit < TINY:  # all texts are equal, or all channels are zero: nothing to validate on
        return Shrinkage(DAMPINGS[-1], 0.0)
    residuals = [_judged_residual(weight, fold, behind_norm) / unit for fold in folds]
    grams = [fold.gram / unit for fold in folds]

    @cache
    def gain(index: int) -> tuple[float, float]:
        """The gain of the damping with this index, and its best strength."""
        slope = curvature = 0.0
        for fit, test in ((0, 1), (1, 0)):
            solution = _damped_solution(residuals[fit], grams[fit], DAMPINGS[index])
            if solution is None:
                return float("-inf"), 0.0
            slope += float((solution * residuals[test]).sum())
            curvature += float((linear(solution, grams[test]) * solution).sum())  # G is symmetric
        strength = min(max(slope / max(curvature, TINY), 0.0), 1.0)
        return 2 * strength * slope - strength**2 * curvature, strength

    chosen = _climb(lambda index: gain(index)[0], DAMPINGS.index(START_DAMPING), len(DAMPINGS))
    enough = (1 - TOLERANCE) * gain(chosen)[0]
    while chosen + 1 < len(DAMPINGS) and gain(chosen + 1)[0] >= enough:
        chosen += 1
    return Shrinkage(DAMPINGS[chosen], gain(chosen)[1])


def _climb(value: Callable[[int], float], start: int, count: int) -> int:
    """The index below `count` at which `value` is largest, if it has one maximum: climbs from `start` in both directions."""
    best = start
    for step in (1, -1):
        while 0 <= best + step < count and value(best + step) > value(best):
            best += step
    return best


def _damped_solution(residual: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor | None:
    """R · (G + λI)⁻¹ [D, K] for R `residual` [D, K] and G `gram` [K, K]; None if float32 is too coarse for so small a λ."""
    import torch

    matrix = gram.clone()
    matrix.diagonal().add_(damping * gram.diagonal().mean().clamp(min=TINY))
    return torch.cholesky_solve(residual.T, matrix).T if triangular.cholesky(matrix) else None


def _judged_residual(weight: torch.Tensor, moments: Moments, behind_norm: bool) -> torch.Tensor:
    """Σ d xᵀ [D, K], with d what the judged outputs of `weight` lack; D is at most JUDGED_OUTPUTS."""
    rows = slice(None, None, -(-len(weight) // JUDGED_OUTPUTS))
    if behind_norm:
        return matmul(weight[rows], _cross(moments))
    return _cross(moments)[rows] - linear(weight[rows], moments.gram)


def _residual(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Σ (target output − W x) xᵀ [N, K]."""
    return _cross(moments) - linear(weight, moments.gram)


def _cross(moments: Moments) -> torch.Tensor:
    if moments.cross is None:
        raise ValueError("no targets were summed")
    return moments.cross
