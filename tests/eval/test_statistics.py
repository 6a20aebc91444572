"""Bootstrap intervals, Spearman's ρ and neighbour lists against scipy, scikit-learn and values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from qembed import bootstrap
from qembed.eval import neighbours, ranks

RANDOM = np.random.default_rng(5)


def test_interval_of_a_mean_is_that_of_scipy() -> None:
    values = RANDOM.beta(20, 1, 300)
    found = bootstrap.of_mean(values)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found is not None
    assert found[0] < values.mean() < found[1]
    width = expected.high - expected.low
    assert found == pytest.approx((expected.low, expected.high), abs=0.1 * width)


def test_columns_have_the_intervals_that_they_have_alone() -> None:
    values = RANDOM.normal(size=(50, 3))
    assert np.allclose(bootstrap.of_means(values), [bootstrap.of_mean(values[:, column]) for column in range(3)])


def test_one_value_has_no_interval_and_a_constant_one_of_no_width() -> None:
    assert bootstrap.of_mean(np.array([0.5])) is None
    assert bootstrap.of_mean(np.full(7, 0.25)) == pytest.approx((0.25, 0.25))


def test_interval_of_any_number_is_that_of_scipy() -> None:
    left = RANDOM.normal(size=80)
    right = left + RANDOM.normal(size=80)
    found = bootstrap.of_statistic(lambda rows: ranks.spearman(left[rows], right[rows]), 80)
    expected = stats.bootstrap(
        (left, right), lambda a, b: stats.spearmanr(a, b).statistic, n_resamples=1000, method="percentile",
        paired=True, vectorized=False, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found == pytest.approx((expected.low, expected.high), abs=0.1 * (expected.high - expected.low))
    assert bootstrap.of_statistic(lambda _: float("nan"), 80) is None


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_is_that_of_scipy_with_and_without_ties(levels: int) -> None:
    left = RANDOM.integers(0, levels, 200).astype(float)
    right = left + RANDOM.integers(-levels, levels, 200)
    assert ranks.spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
    assert ranks.ranks(left) == pytest.approx(stats.rankdata(left))


def test_spearman_by_hand() -> None:
    assert ranks.ranks(np.array([10.0, 30, 20, 20])).tolist() == [1, 4, 2.5, 2.5]
    # d = (0, 0, 1, −1): 1 − 6·2 / (4·15)
    assert ranks.spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3])) == pytest.approx(1 - 12 / 60)
    assert np.isnan(ranks.spearman(np.ones(3), np.arange(3.0)))


def unit(*shape: int) -> np.ndarray:
    vectors = RANDOM.normal(size=shape).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_nearest_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 4 * 90 * 7)  # seven queries at a time
    index, queries = unit(90, 8), unit(40, 8)
    expected = NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(index).kneighbors(queries)[1]
    assert neighbours.nearest(queries, index, 10).tolist() == expected.tolist()


def test_a_text_is_not_its_own_neighbour_and_of_equals_the_first_comes_first() -> None:
    index = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    assert neighbours.nearest(index, index, 2, np.arange(4)).tolist() == [[2, 3], [0, 2], [0, 3], [0, 2]]


def test_share_of_neighbours_by_hand() -> None:
    lists = np.array([[1, 2, 3], [5, 6, 7]])
    reference = np.array([[1, 3, 9], [6, 5, 7]])
    assert neighbours.shared(lists, reference, 1).tolist() == [1, 0]
    assert neighbours.shared(lists, reference, 2).tolist() == [0.5, 1]
    assert neighbours.shared(lists, reference, 3).tolist() == pytest.approx([2 / 3, 1])


def test_comparison_with_an_old_index_by_hand() -> None:
    # On a circle, in degrees. The candidate turns the third text from 50 to 20.
    def circle(*degrees: float) -> np.ndarray:
        turned = np.radians(degrees)
        return np.stack([np.cos(turned), np.sin(turned)], axis=1)

    baseline, candidate = circle(0, 15, 50, 90), circle(0, 15, 20, 90)
    found = neighbours.compare(candidate, baseline)
    assert found is not None
    assert (found.texts, found.queries, found.paired) == (4, 4, 4)
    # Nearest in the baseline: 15, 0, 15, 50. Candidate: 15, 20 (not 0), 15, 20. Mixed, baseline's index: 15, 0, 15, 50.
    assert found.candidate.overlap["1"] == pytest.approx(3 / 4)
    assert found.mixed.overlap["1"] == pytest.approx(4 / 4)
    assert found.candidate.overlap["10"] == 1  # all three others
    angles = [15, 50, 90, 35, 75, 40], [15, 20, 90, 5, 75, 70]
    expected = stats.spearmanr(*(np.cos(np.radians(one)) for one in angles)).statistic
    assert found.candidate.spearman == pytest.approx(expected)
    # A pair is known twice to the mix: the candidate's query i on the baseline's j, and the other way round.
    old, new = (0, 15, 50, 90), (0, 15, 20, 90)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    mixed = [(np.cos(np.radians(old[i] - new[j])) + np.cos(np.radians(new[i] - old[j]))) / 2 for i, j in pairs]
    assert found.mixed.spearman == pytest.approx(stats.spearmanr(np.cos(np.radians(angles[0])), mixed).statistic)


def test_large_sets_are_sampled_and_unusable_vectors_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "QUERIES", 12)
    monkeypatch.setattr(neighbours, "PAIRED", 9)
    baseline = unit(40, 6)
    candidate = baseline + 0.01 * unit(40, 6)
    candidate[3] = np.nan
    baseline[7] = 0
    found = neighbours.compare(candidate, baseline)
    assert found is not None
    assert (found.texts, found.queries, found.paired) == (38, 12, 9)
    assert 0.8 < found.candidate.overlap["10"] <= 1
    assert neighbours.compare(candidate[:4], baseline[:4]) is not None
    assert neighbours.compare(candidate[2:4], baseline[2:4]) is None
