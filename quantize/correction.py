"""Correction of a linear layer towards the original model: least squares, shrunk by cross-validation.

The inputs of a layer have drifted, because the layers before it are quantized. A change of its weight can undo the part of
the drift that is a linear function of the inputs. Full least squares would fit every direction of the inputs, including those
in which a few thousand tokens show mostly noise; as each layer is fitted to the output of the one before, the overfitting
adds up, and on texts and prompts unlike the calibration texts the model ends further from the original than without
correction.

So the calibration texts are split into two halves. Each half's solution, for every damping in DAMPINGS, is evaluated on the
other half. The largest damping that gains nearly as much as the best (TOLERANCE) is used for both halves together, multiplied
by its optimal strength. If nothing is gained, the weight stays.

One eigendecomposition G = V·diag(s)·Vᵀ of a half's Gram matrix serves all dampings: the solution is P·diag(1/(s + λ))·Vᵀ with
P = R·V, and its gain on the other half is a linear and a quadratic form in 1/(s + λ).
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
"""Shares of the Gram matrix's mean diagonal. Beyond the last one a solution is a gradient step, and its strength the length."""
TOLERANCE = 0.03
"""Choose the largest damping whose gain is at most this share below the maximum. Gains near the maximum differ by chance, and a
smaller change is safer on texts unlike the calibration texts (compare the one-standard-error rule, Breiman et al. 1984,
Classification and Regression Trees, section 3.4.3)."""
SMALLEST = 1e-30


@dataclass(frozen=True)
class Shrinkage:
    """How far a least-squares solution is shrunk.

    Attributes:
        damping: λ of the least squares, as a share of the Gram matrix's mean diagonal.
        strength: 0…1, factor of the solution.
    """

    damping: float
    strength: float


def corrected(weight: torch.Tensor, folds: Sequence[Moments], behind_norm: bool) -> torch.Tensor:
    """`weight` [N, K] changed so that its outputs on the drifted inputs come closer to the original model's.

    Args:
        weight: weights of all linears that read the input, stacked.
        folds: moments of the two halves of the calibration texts, with `cross`: the drift of the inputs [K, K] if
            `behind_norm`, otherwise the target outputs [N, K].
        behind_norm: whether the input comes from a norm, whose output in the original model is known.
    """
    moments = Moments.total(folds)
    chosen = shrinkage(weight, folds, behind_norm)
    if not chosen.strength:
        return weight
    inverse = Inverse.of(moments.gram, chosen.damping)
    change = (
        matmul(weight, inverse.least_squares(_cross(moments)))
        if behind_norm
        else inverse.least_squares(_residual(weight, moments))
    )
    return weight + chosen.strength * change


def shrinkage(weight: torch.Tensor, folds: Sequence[Moments], behind_norm: bool) -> Shrinkage:
    """The largest damping whose gain from either half on the other is within TOLERANCE of the best, and its strength.

    Arguments as for `corrected`.
    """
    import torch

    unit = float(sum(fold.gram.diagonal().mean() for fold in folds))  # keeps squares within the range of float32
    if len(folds) != 2 or unit < SMALLEST:  # nothing to validate on: equal texts, or channels that are all zero
        return Shrinkage(DAMPINGS[-1], 0.0)
    measure = matmul(weight.T, weight) if behind_norm else None
    missing = [(_cross(fold) if behind_norm else _residual(weight, fold)) / unit for fold in folds]
    grams = [fold.gram / unit for fold in folds]
    linear, square = (torch.zeros(len(DAMPINGS), dtype=torch.float64) for _ in range(2))
    for here, there in ((0, 1), (1, 0)):
        first, second = _gains(missing[here], grams[here], missing[there], grams[there], measure)
        linear, square = linear + first, square + second
    strength = (linear / square.clamp(min=SMALLEST)).clamp(0, 1)
    gains = 2 * strength * linear - strength.square() * square
    best = int((gains >= (1 - TOLERANCE) * gains.max()).nonzero().max())
    return Shrinkage(DAMPINGS[best], float(strength[best]))


def _gains(
    missing: torch.Tensor,
    gram: torch.Tensor,
    missing_there: torch.Tensor,
    gram_there: torch.Tensor,
    measure: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain of one half's solutions on the other half: two vectors by DAMPINGS [9] float64, gain = 2·α·first − α²·second.

    Args:
        missing: R [D, K] of the half that is solved on; R = Σ d xᵀ with d the residual.
        gram: G [K, K] of that half.
        missing_there: R of the half that it is evaluated on.
        gram_there: G of that half.
        measure: [D, D], metric of the errors: WᵀW if d is an input of the linears W; None for the identity.
    """
    import torch

    values, vectors = torch.linalg.eigh(gram)
    solution, wanted = matmul(missing, vectors), matmul(missing_there, vectors)
    moved = solution if measure is None else matmul(measure, solution)
    along = (moved * wanted).sum(0).double()
    across = matmul(vectors.T, matmul(gram_there, vectors)).mul_(matmul(solution.T, moved))
    added = values.new_tensor(DAMPINGS) * gram.diagonal().mean().clamp(min=SMALLEST)
    shrunk = (values.clamp(min=0)[None] + added[:, None]).reciprocal()
    return (shrunk.double() @ along).cpu(), (matmul(shrunk, across) * shrunk).sum(1).double().cpu()


def _residual(weight: torch.Tensor, fold: Moments) -> torch.Tensor:
    """Σ d xᵀ [N, K] with the residual d = target output − output of `weight`."""
    return _cross(fold) - matmul(weight, fold.gram)


def _cross(moments: Moments) -> torch.Tensor:
    if moments.cross is None:
        raise ValueError("no targets were summed")
    return moments.cross
