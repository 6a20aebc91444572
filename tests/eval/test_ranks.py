"""Ranks and Spearman's ρ against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qembed.eval import ranks

RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_equals_scipys_with_and_without_ties(levels: int) -> None:
    left = RANDOM.integers(0, levels, 200).astype(float)
    right = left + RANDOM.integers(-levels, levels, 200)
    assert ranks.spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
    assert ranks.ranks(left) == pytest.approx(stats.rankdata(left))


def test_spearman_by_hand() -> None:
    assert ranks.ranks(np.array([10.0, 30, 20, 20])).tolist() == [1, 4, 2.5, 2.5]
    # d = (0, 0, 1, −1): 1 − 6·2 / (4·15)
    assert ranks.spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3])) == pytest.approx(1 - 12 / 60)
    assert np.isnan(ranks.spearman(np.ones(3), np.arange(3.0)))
