"""Cosines and their summaries against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qembed.checkpoint import matryoshka
from qembed.eval import fidelity

NAN = float("nan")


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


def test_cosine_of_each_row_by_hand() -> None:
    candidate = rows([3, 4], [1, 0], [1, 0], [2, 0])
    baseline = rows([4, 3], [0, 5], [-3, 0], [1, 0])
    assert fidelity.cosines(candidate, baseline) == pytest.approx([24 / 25, 0, -1, 1])


def test_cosine_stays_in_its_range_and_ignores_length() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 33))
    same = fidelity.cosines(vectors, vectors * 7)
    assert same.max() <= 1.0
    assert same == pytest.approx(1)
    assert fidelity.cosines(rows([1e-30, 1e-30]), rows([1e30, 1e30])) == pytest.approx([1])


def test_prefix_is_renormalised() -> None:
    # Whole vectors: 3·4 + 4·3 + 0 = 24 over 5 · 13; the first two elements alone: 24 over 5 · 5.
    candidate, baseline = rows([3, 4, 0]), rows([4, 3, 12])
    assert fidelity.cosines_at(candidate, baseline, 3) == pytest.approx([24 / 65])
    assert fidelity.cosines_at(candidate, baseline, 2) == pytest.approx([24 / 25])
    assert fidelity.cosines_at(candidate, baseline, 1) == pytest.approx([1])


@pytest.mark.parametrize("dimension", [0, 4])
def test_prefix_must_exist(dimension: int) -> None:
    with pytest.raises(ValueError, match=str(dimension)):
        fidelity.cosines_at(rows([1, 2, 3]), rows([1, 2, 3]), dimension)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        fidelity.cosines(rows([1, 2, 3]), rows([1, 2]))


@pytest.mark.parametrize(
    ("full", "expected"),
    [(256, [32, 64, 128, 256]), (1024, [32, 64, 128, 256, 512, 768, 1024]), (100, [32, 64, 100]), (16, [16])],
)
def test_dimensions_go_up_to_the_models_own(full: int, expected: list[int]) -> None:
    assert matryoshka.sizes(full) == expected


def test_summary_by_hand() -> None:
    # 101 values 0.00, 0.01 … 1.00: the k-th percentile is the value of rank k.
    summary = fidelity.summarize(np.linspace(1, 0, 101))
    assert (summary.count, summary.undefined) == (101, 0)
    assert (summary.mean, summary.median, summary.p5, summary.p1, summary.minimum) == pytest.approx((0.5, 0.5, 0.05, 0.01, 0))


def test_percentiles_are_interpolated_linearly() -> None:
    # Ranks 0 and 1: the 5th percentile is a twentieth of the way from 0.8 to 1.
    summary = fidelity.summarize(np.array([1.0, 0.8]))
    assert summary.p5 == pytest.approx(0.81)
    assert summary.p1 == pytest.approx(0.802)


def test_undefined_cosines_are_counted_and_not_averaged_as_zero() -> None:
    candidate = rows([1, 0], [NAN, 1], [0, 0], [np.inf, 1], [0, 1])
    baseline = rows([1, 0], [1, 1], [1, 0], [1, 1], [1, 0])
    values = fidelity.cosines(candidate, baseline)
    assert np.isnan(values).tolist() == [False, True, True, True, False]
    summary = fidelity.summarize(values)
    assert (summary.count, summary.undefined, summary.mean, summary.minimum) == (5, 3, 0.5, 0)
    assert np.isnan(fidelity.cosines(baseline, candidate)).sum() == 3


def test_a_summary_without_defined_cosines_has_no_numbers() -> None:
    assert fidelity.summarize(np.array([NAN])) == fidelity.Summary(1, 1, None, None, None, None, None, None)


def test_each_group_has_its_own_summary() -> None:
    summaries = fidelity.summarize_by(np.array([1.0, 0.5, 0.0, 0.7]), ["de", "en", "de", "en"])
    assert list(summaries) == ["de", "en"]
    assert (summaries["de"].mean, summaries["de"].count) == (0.5, 2)
    assert summaries["en"].mean == pytest.approx(0.6)
    with pytest.raises(ValueError, match="2 labels for 1 values"):
        fidelity.summarize_by(np.array([1.0]), ["de", "en"])


def test_the_worst_come_first_and_undefined_ones_before_them() -> None:
    assert fidelity.worst(np.array([0.9, -0.2, NAN, 0.9, 0.1]), 4) == [2, 1, 4, 0]
    assert fidelity.worst(np.array([0.5]), 10) == [0]


def test_unusable_vectors_are_counted() -> None:
    vectors = rows([1, 0], [0, 0], [NAN, 0], [np.inf, 1], [0, 0])
    assert fidelity.not_finite(vectors) == 2
    assert fidelity.zero(vectors) == 2
