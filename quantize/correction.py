"""Correction of a linear layer towards the original model: least squares, regularized by cross-validation.

Plain least squares uses every direction of the inputs, even those in which a few thousand tokens show little but noise. The
next layer is then fitted to the result, and the overfitting accumulates: on texts and prompts unlike the calibration texts, the
model ends further from the original than without any correction. So the calibration texts are split into two halves. The
solution on each half, for every damping in DAMPINGS, is judged by its gain on the other half. The largest damping whose gain is
within TOLERANCE of the best, with the best strength for it, is then used on both halves together. If there is no gain, the
weight does not change.

A single eigendecomposition G = V·diag(s)·Vᵀ of a half's Gram matrix serves all dampings: the solution is P·diag(1/(s + λ))·Vᵀ
with P = R·V, and its gain on the other half consists of a linear and a quadratic form in 1/(s + λ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qembed.quantize.hidden import Moments
from qembed.quantize.products import matmul
from qembed.quantize.rounding import Inverse

if TYPE_CHECKING:
    import torch

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""λ as shares of the mean diagonal of the Gram matrix. For larger λ the solution is a gradient step of length `strength`."""
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


def correct(weight: torch.Tensor, folds: Sequence[Moments], behind_norm: bool) -> torch.Tensor:
    """Move `weight` [N, K], whose inputs come from quantized layers, towards the outputs of the original model.

    Args:
        weight: the weights of all linear layers that read the input, stacked.
        folds: moments of the two halves of the calibration, with `cross`: [K, K] if `behind_norm`, otherwise [N, K].
        behind_norm: whether the input comes from a norm; `Moments.cross` then holds differences of inputs, otherwise target
            outputs.
    """
    moments = Moments.total(folds)
    shrinkage = cross_validate(weight, folds, behind_norm)
    if not shrinkage.strength:
        return weight
    inverse = Inverse.of(moments.gram, shrinkage.damping)
    if behind_norm:
        change = matmul(weight, inverse.least_squares(_cross(moments)))
    else:
        change = inverse.least_squares(_residual(weight, moments))
    return weight + shrinkage.strength * change


def cross_validate(weight: torch.Tensor, folds: Sequence[Moments], behind_norm: bool) -> Shrinkage:
    """The largest damping whose gain is within TOLERANCE of the best, and the best strength for it; arguments as in `correct`.

    The gain of a damping is that of either half's solution on the other half, summed.
    """
    import torch

    unit = float(sum(fold.gram.diagonal().mean() for fold in folds))  # keeps squares within float32
    if len(folds) != 2 or unit < TINY:  # all texts are equal, or all channels are zero: nothing to validate on
        return Shrinkage(DAMPINGS[-1], 0.0)
    metric = matmul(weight.T, weight) if behind_norm else None
    residuals = [(_cross(fold) if behind_norm else _residual(weight, fold)) / unit for fold in folds]
    grams = [fold.gram / unit for fold in folds]
    linear, quadratic = (torch.zeros(len(DAMPINGS), dtype=torch.float64) for _ in range(2))
    for fit, test in ((0, 1), (1, 0)):
        fold_linear, fold_quadratic = _gains(residuals[fit], grams[fit], residuals[test], grams[test], metric)
        linear, quadratic = linear + fold_linear, quadratic + fold_quadratic
    strength = (linear / quadratic.clamp(min=TINY)).clamp(0, 1)
    gains = 2 * strength * linear - strength.square() * quadratic
    best = int((gains >= (1 - TOLERANCE) * gains.max()).nonzero().max())
    return Shrinkage(DAMPINGS[best], float(strength[best]))


def _gains(
    residual: torch.Tensor,
    gram: torch.Tensor,
    test_residual: torch.Tensor,
    test_gram: torch.Tensor,
    metric: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a solution on one half of the calibration gains on the other half, for each of DAMPINGS.

    Args:
        residual: R = Σ d xᵀ [D, K] of the half to solve on, with d the correction that an output (or an input) needs.
        gram: G [K, K] of that half.
        test_residual: R of the half to judge by.
        test_gram: G of that half.
        metric: [D, D], the metric of errors: WᵀW if d is an error of the inputs of W; None is the identity.

    Returns:
        (linear, quadratic), both [9] float64: with strength α, the gain is 2·α·linear − α²·quadratic.
    """
    import torch

    values, vectors = torch.linalg.eigh(gram)
    solution, target = matmul(residual, vectors), matmul(test_residual, vectors)
    weighted = solution if metric is None else matmul(metric, solution)
    linear = (weighted * target).sum(0).double()
    quadratic = matmul(vectors.T, matmul(test_gram, vectors)).mul_(matmul(solution.T, weighted))
    damping = values.new_tensor(DAMPINGS) * gram.diagonal().mean().clamp(min=TINY)
    inverse = (values.clamp(min=0)[None] + damping[:, None]).reciprocal()
    return (inverse.double() @ linear).cpu(), (matmul(inverse, quadratic) * inverse).sum(1).double().cpu()


def _residual(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Σ (target output − W x) xᵀ [N, K]."""
    return _cross(moments) - matmul(weight, moments.gram)


def _cross(moments: Moments) -> torch.Tensor:
    if moments.cross is None:
        raise ValueError("no targets were summed")
    return moments.cross
