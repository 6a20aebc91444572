"""Recall of an approximate index: its ten nearest compared with the true ten nearest, by search width.

Counted as in ann-benchmarks (Aumüller et al. 2020): a result as near as the last of the true nearest is correct, so that equal
texts do not count against an index that returns another one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.search.build import Kind
from qembed.search.nearest import Floats, Rows, nearest, widths

DEPTH = 10
QUERIES = 200
TIMED = 50
TIMED_SECONDS = 2.0
EPSILON = 1e-5
ENOUGH = 0.95
COMPLETE = 0.9995


@dataclass(frozen=True)
class Point:
    """A search width: mean recall of the `depth` nearest with its 95% interval, recall of the nearest, ms per query."""

    width: int
    recall: float
    interval: bootstrap.Interval | None
    first: float
    milliseconds: float


@dataclass(frozen=True)
class Recall:
    """Recall of an index over `queries` queries for their `depth` nearest; times are of single queries.

    `exact` is milliseconds per query of exact search, `chosen` the smallest width that reaches the recall `wanted`, or the
    largest width if none does.
    """

    queries: int
    source: str
    depth: int
    wanted: float
    exact: float
    chosen: int
    points: list[Point]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def measure(
    index: Any,
    kind: Kind,
    queries: Floats,
    own: NDArray[np.intp] | None,
    wanted: float,
    source: str,
    on_width: Callable[[int], None],
) -> Recall:
    """Measure the recall of an IVF-Flat or HNSW `index` for `queries` [q, d] at growing widths, until `wanted` and almost all.

    `own` [q] are the rows of queries that are in the index themselves; they do not count as results. `source` describes the
    queries. `on_width` is called with each width before it is measured.
    """
    own_rows = 0 if own is None else 1
    depth = max(1, min(DEPTH, int(index.ntotal) - own_rows))
    best, _, exact = _search(index, kind, queries, own, depth, None)
    bounds = best[:, [0, depth - 1]] - EPSILON
    points: list[Point] = []
    for width in widths(index, kind, depth + own_rows):
        on_width(width)
        scores, rows, milliseconds = _search(index, kind, queries, own, depth, width)
        returned = rows >= 0
        recalls = (returned & (scores >= bounds[:, 1:])).mean(axis=1)
        first = (returned[:, 0] & (scores[:, 0] >= bounds[:, 0])).mean()
        points.append(Point(width, float(recalls.mean()), bootstrap.of_mean(recalls), float(first), milliseconds))
        if points[-1].recall >= max(COMPLETE, wanted):
            break
    chosen = next((point.width for point in points if point.recall >= wanted), points[-1].width)
    return Recall(len(queries), source, depth, wanted, exact, chosen, points)


def _search(
    index: Any, kind: Kind, queries: Floats, own: NDArray[np.intp] | None, depth: int, width: int | None
) -> tuple[Floats, Rows, float]:
    """Cosines and rows [q, depth] without the queries' own rows, and median milliseconds of single queries."""
    all_scores, all_rows = nearest(index, kind, queries, depth + (own is not None), width)
    scores = np.full((len(queries), depth), -np.inf, np.float32)
    rows = np.full((len(queries), depth), -1, np.int64)
    for query in range(len(queries)):
        others = np.flatnonzero(all_rows[query] != own[query])[:depth] if own is not None else np.arange(depth)
        scores[query, : len(others)] = all_scores[query][others]
        rows[query, : len(others)] = all_rows[query][others]
    return scores, rows, _milliseconds(index, kind, queries[:TIMED], depth + (own is not None), width)


def _milliseconds(index: Any, kind: Kind, queries: Floats, depth: int, width: int | None) -> float:
    """Median time of a single query.

    Stops after TIMED_SECONDS: exact search in ten million vectors takes seconds per query, a batch reads memory once.
    """
    seconds: list[float] = []
    for query in queries:
        started = time.perf_counter()
        nearest(index, kind, query[None], depth, width)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > TIMED_SECONDS:
            break
    return float(np.median(seconds) * 1000)
