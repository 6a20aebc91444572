"""Bootstrap intervals against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qembed import bootstrap

RANDOM = np.random.default_rng(5)


def test_interval_of_a_mean_is_that_of_scipy() -> None:
    values = RANDOM.beta(20, 1, 300)
    interval = bootstrap.of_mean(values)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert interval is not None
    assert interval[0] < values.mean() < interval[1]
    width = expected.high - expected.low
    assert interval == pytest.approx((expected.low, expected.high), abs=0.1 * width)


def test_columns_have_the_intervals_that_they_have_alone() -> None:
    values = RANDOM.normal(size=(50, 3))
    assert np.allclose(bootstrap.of_means(values), [bootstrap.of_mean(values[:, column]) for column in range(3)])


def test_one_value_has_no_interval_and_a_constant_one_of_no_width() -> None:
    assert bootstrap.of_mean(np.array([0.5])) is None
    assert bootstrap.of_mean(np.full(7, 0.25)) == pytest.approx((0.25, 0.25))


def test_interval_of_any_number_is_that_of_scipy() -> None:
    left = RANDOM.normal(size=80)
    right = left + RANDOM.normal(size=80)
    interval = bootstrap.of_statistic(lambda rows: float(stats.spearmanr(left[rows], right[rows]).statistic), 80)
    expected = stats.bootstrap(
        (left, right), lambda a, b: stats.spearmanr(a, b).statistic, n_resamples=1000, method="percentile",
        paired=True, vectorized=False, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert interval == pytest.approx((expected.low, expected.high), abs=0.1 * (expected.high - expected.low))
    assert bootstrap.of_statistic(lambda _: float("nan"), 80) is None
