"""Least squares towards the original model is used as far as it holds on texts that it was not solved on."""

from __future__ import annotations

import random

import pytest
import torch

from qembed.quantize import stream
from qembed.quantize.calibration import Calibration
from qembed.quantize.checks import shape_of
from qembed.quantize.correction import DAMPINGS, TOLERANCE, corrected, shrinkage
from qembed.quantize.hidden import Moments
from qembed.quantize.settings import QuantizationSettings

from .conftest import MakeCheckpoint


def moments(x: torch.Tensor, missing: torch.Tensor) -> Moments:
    return Moments(x.T @ x, missing.T @ x)


def halves(x: torch.Tensor, missing: torch.Tensor) -> list[Moments]:
    half = len(x) // 2
    return [moments(x[:half], missing[:half]), moments(x[half:], missing[half:])]


def inputs(tokens: int, width: int = 96, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, as a layer's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -1.5, width)
    return torch.randn(tokens, width, generator=generator) @ mixing.T


def test_what_is_chance_is_not_learned() -> None:
    x = inputs(200)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.1
    noise = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    folds = halves(x, x @ weight.T + noise)
    moved = corrected(weight, folds, behind_norm=False)
    full = weight + torch.linalg.lstsq(x, noise).solution.T
    fresh = inputs(2000, seed=5)
    assert (fresh @ (moved - weight).T).square().mean() < 0.05 * (fresh @ (full - weight).T).square().mean()


@pytest.mark.parametrize("behind_norm", [False, True])
def test_what_holds_on_other_texts_is_taken_back(behind_norm: bool) -> None:
    x = inputs(3000)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.1
    drift = torch.randn(96, 96, generator=torch.Generator().manual_seed(2)) * 0.05
    wanted = weight + weight @ drift
    missing = x @ drift.T if behind_norm else x @ wanted.T
    chosen = shrinkage(weight, halves(x, missing), behind_norm)
    assert chosen.strength > 0.95
    moved = corrected(weight, halves(x, missing), behind_norm)
    fresh = inputs(1000, seed=5)
    assert (fresh @ (moved - wanted).T).square().mean() < 0.05 * (fresh @ (weight - wanted).T).square().mean()


def test_the_largest_damping_is_taken_that_gains_as_much_on_the_other_half() -> None:
    x, weight = inputs(300), torch.zeros(8, 96)
    generator = torch.Generator().manual_seed(3)
    missing = x @ torch.randn(96, 8, generator=generator) + 3 * torch.randn(300, 8, generator=generator)
    folds = halves(x, missing)
    gains = []
    for damping in DAMPINGS:
        linear, square = 0.0, 0.0
        for here, there in ((0, 1), (1, 0)):
            gram, cross = folds[here].gram.double(), folds[here].cross
            assert cross is not None
            ridge = gram + damping * gram.diagonal().mean() * torch.eye(96)
            solved = torch.linalg.solve(ridge, cross.double().T).T
            part = slice(150 * there, 150 * (there + 1))
            given = x[part].double() @ solved.T
            linear += (given * missing[part]).sum().item()
            square += given.square().sum().item()
        strength = min(1.0, max(0.0, linear / square))
        gains.append((2 * strength * linear - strength**2 * square, damping, strength))
    _, damping, strength = [one for one in gains if one[0] >= (1 - TOLERANCE) * max(gains)[0]][-1]
    chosen = shrinkage(weight, folds, behind_norm=False)
    assert chosen.damping == damping
    assert chosen.strength == pytest.approx(strength, rel=1e-3)


def test_without_a_second_half_nothing_is_moved() -> None:
    x, weight = inputs(100), torch.randn(8, 96)
    assert torch.equal(corrected(weight, [moments(x, torch.randn(100, 8))], behind_norm=False), weight)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_inputs_of_any_size_and_dead_ones_give_finite_weights(size: float) -> None:
    x = inputs(300) * size
    x[:, 7] = 0
    weight = torch.randn(8, 96) * 0.1
    for folds in (halves(x, x @ weight.T * 1.1), [Moments(torch.zeros(96, 96), torch.zeros(8, 96))] * 2):
        assert torch.isfinite(corrected(weight, folds, behind_norm=False)).all()


def test_folds_hold_a_text_with_its_copies_and_equal_texts_together() -> None:
    rows = [[1, 2, 3, 9], [4, 5, 9], [1, 2, 3, 9], [6, 7, 8, 9], [5, 5, 9], [1, 2, 3, 9]]
    folds = stream._folds(rows, [0, 1, 2, 3, 4, 5], seed=0)
    assert folds[0] == folds[2] == folds[5]
    assert set(folds.values()) == {0, 1}
    assert abs(sum(1 if fold else -1 for fold in [folds[0], folds[1], folds[3], folds[4]])) == 0


@pytest.mark.slow
def test_few_tokens_and_many_channels_still_end_nearer_than_plain_rounding_on_fresh_texts(
    make_checkpoint: MakeCheckpoint,
) -> None:
    """Some 500 tokens for layers of 128 to 512 inputs: full least squares memorises them."""
    checkpoint = make_checkpoint(num_hidden_layers=6, intermediate_size=512)
    draw = random.Random(0)
    rows = [[*(draw.randrange(256) for _ in range(8)), 256] for _ in range(56 + 64)]
    calibration = Calibration(rows, frozenset(range(56, 120)), "made", "", 0, 32, 0)
    lost = {}
    plain = QuantizationSettings(group_size=64, scales="none", clip=False, rounding="rtn", target="layer", prefixes=0, mixed=0)
    for name, settings in {"plain": plain, "ours": QuantizationSettings(group_size=64, prefixes=0, mixed=0)}.items():
        report = stream.quantize(checkpoint, shape_of(checkpoint, 64), calibration, settings, torch.device("cpu"))
        lost[name] = 1 - sum(report.cosines) / len(report.cosines)
    assert lost["ours"] < 0.8 * lost["plain"], lost
