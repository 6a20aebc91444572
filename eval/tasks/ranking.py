"""Ranking metrics per query: pure functions, defined as in trec_eval (`ndcg_cut`, `map_cut`, `recall`).

`gains` [q, k] are the grades of the retrieved passages, best first (0 if not relevant); `grades` are, for each query, the
grades of all relevant passages, retrieved or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def gains(lists: NDArray[np.intp], relevant: Sequence[Mapping[int, int]]) -> Floats:
    """The grade of each entry of `lists` [q, k] (passage rows; below 0: nothing retrieved), given each query's `relevant`."""
    grades_of_lists = [[grades.get(int(row), 0) for row in rows] for rows, grades in zip(lists, relevant, strict=True)]
    return np.array(grades_of_lists, np.float64).reshape(lists.shape)


def ndcg(gains: Floats, grades: Sequence[Sequence[int]], depth: int) -> Floats:
    """nDCG@depth [q]: Σ grade / log₂(rank + 1), relative to the ideal order (Järvelin & Kekäläinen 2002, linear gain)."""
    retrieved = gains[:, :depth]
    discounts = 1 / np.log2(np.arange(2, depth + 2))
    ideal = [np.sort(np.array(of_query, np.float64))[::-1][:depth] for of_query in grades]
    best = np.array([ordered @ discounts[: len(ordered)] for ordered in ideal])
    return np.asarray(retrieved @ discounts[: retrieved.shape[1]] / best)


def average_precision(gains: Floats, grades: Sequence[Sequence[int]], depth: int) -> Floats:
    """AP@depth [q]: mean over all relevant passages of the precision at their rank, 0 for those not retrieved by then."""
    hits = gains[:, :depth] > 0
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return np.asarray((precision * hits).sum(axis=1) / _counts(grades))


def recall(gains: Floats, grades: Sequence[Sequence[int]], depth: int) -> Floats:
    """Recall@depth [q]: share of the relevant passages that were retrieved."""
    return np.asarray((gains[:, :depth] > 0).sum(axis=1) / _counts(grades))


def _counts(grades: Sequence[Sequence[int]]) -> Floats:
    return np.array([len(relevant) for relevant in grades], np.float64)
