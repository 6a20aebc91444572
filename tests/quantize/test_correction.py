"""Cross-validation limits the correction towards the original model to what also holds on other texts."""

from __future__ import annotations

import random

import pytest
import torch

from qembed.quantize import layerwise
from qembed.quantize.calibration import Calibration
from qembed.quantize.checks import shape_of
from qembed.quantize.correction import DAMPINGS, TOLERANCE, correct, cross_validate
from qembed.quantize.hidden import Moments
from qembed.quantize.settings import QuantizationSettings
from tests.checkpoints import MakeCheckpoint


def moments(x: torch.Tensor, difference: torch.Tensor) -> Moments:
    return Moments(x.T @ x, difference.T @ x)


def halves(x: torch.Tensor, difference: torch.Tensor) -> list[Moments]:
    half = len(x) // 2
    return [moments(x[:half], difference[:half]), moments(x[half:], difference[half:])]


def cross_validated(weight: torch.Tensor, folds: list[Moments], behind_norm: bool) -> torch.Tensor:
    shrinkage = cross_validate(weight, folds, behind_norm)
    return correct(weight, Moments.merge(folds), shrinkage, behind_norm)


def inputs(tokens: int, width: int = 96, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, like those of a layer."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -1.5, width)
    return torch.randn(tokens, width, generator=generator) @ mixing.T


def test_noise_is_not_learned() -> None:
    x = inputs(200)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.1
    noise = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    folds = halves(x, x @ weight.T + noise)
    corrected = cross_validated(weight, folds, behind_norm=False)
    unregularized = weight + torch.linalg.lstsq(x, noise).solution.T
    fresh = inputs(2000, seed=5)
    change = (fresh @ (corrected - weight).T).square().mean()
    assert change < 0.05 * (fresh @ (unregularized - weight).T).square().mean()


@pytest.mark.parametrize("behind_norm", [False, True])
def test_drift_that_holds_on_other_texts_is_corrected(behind_norm: bool) -> None:
    x = inputs(3000)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.1
    drift = torch.randn(96, 96, generator=torch.Generator().manual_seed(2)) * 0.05
    target = weight + weight @ drift
    difference = x @ drift.T if behind_norm else x @ target.T
    assert cross_validate(weight, halves(x, difference), behind_norm).strength > 0.95
    corrected = cross_validated(weight, halves(x, difference), behind_norm)
    fresh = inputs(1000, seed=5)
    error = (fresh @ (corrected - target).T).square().mean()
    assert error < 0.05 * (fresh @ (weight - target).T).square().mean()


def test_largest_damping_within_the_tolerance_of_the_best_gain_is_chosen() -> None:
    x, weight = inputs(300), torch.zeros(8, 96)
    generator = torch.Generator().manual_seed(3)
    target = x @ torch.randn(96, 8, generator=generator) + 3 * torch.randn(300, 8, generator=generator)
    folds = halves(x, target)
    gains = []
    for damping in DAMPINGS:
        linear, quadratic = 0.0, 0.0
        for fit, test in ((0, 1), (1, 0)):
            gram, cross = folds[fit].gram.double(), folds[fit].cross
            assert cross is not None
            ridge = gram + damping * gram.diagonal().mean() * torch.eye(96)
            solution = torch.linalg.solve(ridge, cross.double().T).T
            rows = slice(150 * test, 150 * (test + 1))
            output = x[rows].double() @ solution.T
            linear += (output * target[rows]).sum().item()
            quadratic += output.square().sum().item()
        strength = min(1.0, max(0.0, linear / quadratic))
        gains.append((2 * strength * linear - strength**2 * quadratic, damping, strength))
    _, damping, strength = [entry for entry in gains if entry[0] >= (1 - TOLERANCE) * max(gains)[0]][-1]
    shrinkage = cross_validate(weight, folds, behind_norm=False)
    assert shrinkage.damping == damping
    assert shrinkage.strength == pytest.approx(strength, rel=1e-3)


def test_a_single_fold_gives_no_correction() -> None:
    x, weight = inputs(100), torch.randn(8, 96)
    assert torch.equal(cross_validated(weight, [moments(x, torch.randn(100, 8))], behind_norm=False), weight)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_tiny_huge_and_zero_inputs_give_finite_weights(size: float) -> None:
    x = inputs(300) * size
    x[:, 7] = 0
    weight = torch.randn(8, 96) * 0.1
    for folds in (halves(x, x @ weight.T * 1.1), [Moments(torch.zeros(96, 96), torch.zeros(8, 96))] * 2):
        assert torch.isfinite(cross_validated(weight, folds, behind_norm=False)).all()


def test_equal_texts_are_in_the_same_fold() -> None:
    rows = [[1, 2, 3, 9], [4, 5, 9], [1, 2, 3, 9], [6, 7, 8, 9], [5, 5, 9], [1, 2, 3, 9]]
    folds = layerwise._assign_folds(Calibration(rows, frozenset(), "file", "", 0, 9, 0), [0, 1, 2, 3, 4, 5])
    assert folds[0] == folds[2] == folds[5]
    assert set(folds.values()) == {0, 1}
    assert abs(sum(1 if fold else -1 for fold in [folds[0], folds[1], folds[3], folds[4]])) == 0


def test_pairs_of_a_query_are_in_the_same_fold() -> None:
    rows = [[number, 9] for number in range(8)]
    for queries in ((0, 1, 0, 1, 2, 3, 2, 3), (0,) * 8):
        calibration = Calibration(rows, frozenset(), "file", "", 0, 9, 0, 0, queries)
        folds = layerwise._assign_folds(calibration, list(range(8)))
        assert sum(folds.values()) == 4
        if len(set(queries)) > 1:
            assert len({(query, folds[number]) for number, query in enumerate(queries)}) == 4


def test_correction_beats_plain_rounding_with_few_tokens_and_many_channels(
    make_checkpoint: MakeCheckpoint,
) -> None:
    """About 500 tokens for layers of 128 to 512 inputs: unregularized least squares memorizes them."""
    checkpoint = make_checkpoint(num_hidden_layers=6, intermediate_size=512)
    draw = random.Random(0)
    rows = [[*(draw.randrange(256) for _ in range(8)), 256] for _ in range(56 + 64)]
    calibration = Calibration(rows, frozenset(range(56, 120)), "random", "", 0, 32, 0)
    loss = {}
    plain = QuantizationSettings(group_size=64, scales="none", clip=False, rounding="rtn", target="layer", prefixes=0, mixed=0)
    for name, settings in {"plain": plain, "default": QuantizationSettings(group_size=64, prefixes=0, mixed=0)}.items():
        report = layerwise.quantize(checkpoint, shape_of(checkpoint, 64), calibration, settings, torch.device("cpu"))
        loss[name] = 1 - sum(report.cosines) / len(report.cosines)
    assert loss["default"] < 0.8 * loss["plain"], loss
