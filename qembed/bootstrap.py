"""95% intervals by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13).

Rows are resampled with replacement and the statistic is recomputed; the interval holds the middle 95% of the results. Draws
are seeded, so the same values always give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

Interval = tuple[float, float]


def of_means(values: NDArray[np.floating[Any]]) -> list[Interval | None]:
    """The interval of the mean of each column of `values` [n, k], with shared draws; None for fewer than two rows.

    A draw is stored as counts per row, so it takes n + n·k operations and memory for n numbers.
    """
    count, columns = values.shape
    if count < 2:
        return [None] * columns
    random = np.random.default_rng(SEED)
    means = np.empty((RESAMPLES, columns))
    for draw in range(RESAMPLES):
        means[draw] = np.bincount(random.integers(0, count, count), minlength=count) @ values / count
    return [_middle(means[:, column]) for column in range(columns)]


def of_mean(values: NDArray[np.floating[Any]]) -> Interval | None:
    """The interval of the mean of `values` [n]; None for fewer than two."""
    return of_means(values[:, None])[0]


def of_statistic(statistic: Callable[[NDArray[np.intp]], float], count: int) -> Interval | None:
    """The interval of `statistic`, a function of row numbers; None for fewer than two rows.

    Draws with an undefined statistic (NaN) are left out; None if they are more than half.
    """
    return of_strata([(statistic, count)])


def of_strata(parts: Sequence[tuple[Callable[[NDArray[np.intp]], float], int]]) -> Interval | None:
    """As `of_statistic`, for the mean of several statistics whose rows are resampled separately."""
    if not parts or min(count for _, count in parts) < 2:
        return None
    random = np.random.default_rng(SEED)
    drawn = np.array(
        [np.mean([statistic(random.integers(0, count, count)) for statistic, count in parts]) for _ in range(RESAMPLES)]
    )
    defined = drawn[np.isfinite(drawn)]
    return _middle(defined) if len(defined) > RESAMPLES / 2 else None


def _middle(drawn: NDArray[np.floating[Any]]) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
