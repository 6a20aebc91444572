"""Neighbour lists against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from qembed.eval import neighbours

RANDOM = np.random.default_rng(5)


def unit(*shape: int) -> np.ndarray:
    vectors = RANDOM.normal(size=shape).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_nearest_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 4 * 90 * 7)  # blocks of seven queries
    index, queries = unit(90, 8), unit(40, 8)
    expected = NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(index).kneighbors(queries)[1]
    assert neighbours.nearest(queries, index, 10).tolist() == expected.tolist()


def test_a_text_is_not_its_own_neighbour_and_ties_are_in_order() -> None:
    index = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    assert neighbours.nearest(index, index, 2, np.arange(4)).tolist() == [[2, 3], [0, 2], [0, 3], [0, 2]]


def test_share_of_neighbours_by_hand() -> None:
    lists = np.array([[1, 2, 3], [5, 6, 7]])
    reference = np.array([[1, 3, 9], [6, 5, 7]])
    assert neighbours.shared(lists, reference, 1).tolist() == [1, 0]
    assert neighbours.shared(lists, reference, 2).tolist() == [0.5, 1]
    assert neighbours.shared(lists, reference, 3).tolist() == pytest.approx([2 / 3, 1])


def test_comparison_with_an_old_index_by_hand() -> None:
    # On a circle, in degrees. The candidate moves the third text from 50 to 20.
    def circle(*degrees: float) -> np.ndarray:
        turned = np.radians(degrees)
        return np.stack([np.cos(turned), np.sin(turned)], axis=1)

    baseline, candidate = circle(0, 15, 50, 90), circle(0, 15, 20, 90)
    comparison = neighbours.compare(candidate, baseline)
    assert comparison is not None
    assert (comparison.texts, comparison.queries, comparison.paired) == (4, 4, 4)
    # Nearest in the baseline: 15, 0, 15, 50. Candidate: 15, 20 (not 0), 15, 20. Mixed, baseline's index: 15, 0, 15, 50.
    assert comparison.candidate.overlap["1"] == pytest.approx(3 / 4)
    assert comparison.mixed.overlap["1"] == pytest.approx(4 / 4)
    assert comparison.candidate.overlap["10"] == 1  # all three others
    angles = [15, 50, 90, 35, 75, 40], [15, 20, 90, 5, 75, 70]
    expected = stats.spearmanr(*(np.cos(np.radians(degrees)) for degrees in angles)).statistic
    assert comparison.candidate.spearman == pytest.approx(expected)
    # Mixed, each pair counts twice: the candidate's query i with the baseline's j, and j with i.
    old, new = (0, 15, 50, 90), (0, 15, 20, 90)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    mixed = [(np.cos(np.radians(old[i] - new[j])) + np.cos(np.radians(new[i] - old[j]))) / 2 for i, j in pairs]
    assert comparison.mixed.spearman == pytest.approx(stats.spearmanr(np.cos(np.radians(angles[0])), mixed).statistic)


def test_large_sets_are_sampled_without_unusable_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "QUERIES", 12)
    monkeypatch.setattr(neighbours, "PAIRED", 9)
    baseline = unit(40, 6)
    candidate = baseline + 0.01 * unit(40, 6)
    candidate[3] = np.nan
    baseline[7] = 0
    comparison = neighbours.compare(candidate, baseline)
    assert comparison is not None
    assert (comparison.texts, comparison.queries, comparison.paired) == (38, 12, 9)
    assert 0.8 < comparison.candidate.overlap["10"] <= 1
    assert neighbours.compare(candidate[:4], baseline[:4]) is not None
    assert neighbours.compare(candidate[2:4], baseline[2:4]) is None
