"""What an approximate index misses: its ten nearest against the ten nearest of all, by how wide it looks.

Counted as in ann-benchmarks (Aumüller et al. 2020): what is as near as the last of the true nearest is right, so that equal
texts do not count against an index that finds another one of them.
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
    """One width: the mean recall of the `depth` nearest and its 95% interval, of the nearest alone, and the time a query."""

    width: int
    recall: float
    interval: bootstrap.Interval | None
    first: float
    milliseconds: float


@dataclass(frozen=True)
class Recall:
    """An index against exact search: `queries` were asked for their `depth` nearest; times are of one alone.

    `exact` is the milliseconds a query of exact search, `chosen` the least width that reaches `wanted`, or else the widest.
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
    """Ask `index` (IVF-Flat or HNSW) for the nearest of `queries` [q, d], wider and wider until hardly anything is missed.

    `own` [q] are rows that the queries themselves are, and are not looked for. `source` says where the queries come from.
    `on_width` hears each width before it is tried.
    """
    beside = 0 if own is None else 1
    depth = max(1, min(DEPTH, int(index.ntotal) - beside))
    best, _, exact = _asked(index, kind, queries, own, depth, None)
    bounds = best[:, [0, depth - 1]] - EPSILON
    points: list[Point] = []
    for width in widths(index, kind, depth + beside):
        on_width(width)
        scores, rows, milliseconds = _asked(index, kind, queries, own, depth, width)
        there = rows >= 0
        kept = (there & (scores >= bounds[:, 1:])).mean(axis=1)
        first = (there[:, 0] & (scores[:, 0] >= bounds[:, 0])).mean()
        points.append(Point(width, float(kept.mean()), bootstrap.of_mean(kept), float(first), milliseconds))
        if points[-1].recall >= COMPLETE:
            break
    chosen = next((point.width for point in points if point.recall >= wanted), points[-1].width)
    return Recall(len(queries), source, depth, wanted, exact, chosen, points)


def _asked(
    index: Any, kind: Kind, queries: Floats, own: NDArray[np.intp] | None, depth: int, width: int | None
) -> tuple[Floats, Rows, float]:
    """Cosines and rows [q, depth] without the queries' own, and the median milliseconds of a query that is asked alone."""
    found, where = nearest(index, kind, queries, depth + (own is not None), width)
    scores = np.full((len(queries), depth), -np.inf, np.float32)
    rows = np.full((len(queries), depth), -1, np.int64)
    for place in range(len(queries)):
        others = np.flatnonzero(where[place] != own[place])[:depth] if own is not None else np.arange(depth)
        scores[place, : len(others)], rows[place, : len(others)] = found[place][others], where[place][others]
    seconds: list[float] = []
    # A query of ten million vectors takes seconds when all are compared; the batch above shares the reading of memory.
    for query in queries[:TIMED]:
        started = time.perf_counter()
        nearest(index, kind, query[None], depth + (own is not None), width)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > TIMED_SECONDS:
            break
    return scores, rows, float(np.median(seconds) * 1000)
