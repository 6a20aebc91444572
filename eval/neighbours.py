"""Whether texts keep their nearest neighbours: neighbour lists and pairwise similarities of two sets of vectors.

Rows are texts. Vectors have unit length (`fidelity.unit`), so that a product is a cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.eval import fidelity
from qembed.eval.ranks import spearman

QUERIES = 2000
PAIRED = 1000
DEPTHS = (1, 10)
BLOCK_BYTES = 64 * 2**20
SEED = 0

Vectors = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Neighbours:
    """How much of the baseline's neighbourhoods is kept, for given queries and index.

    `overlap` maps a depth k ("1", "10") to the mean share of a text's k nearest in the baseline that are among its k nearest
    here, `interval` to the 95% interval of that mean. `spearman` is ρ between the similarities of all pairs; None if
    undefined.
    """

    overlap: dict[str, float]
    interval: dict[str, bootstrap.Interval | None]
    spearman: float | None


@dataclass(frozen=True)
class Comparison:
    """`candidate`: queries and index of the candidate. `mixed`: the candidate's queries on the baseline's index.

    `texts` have usable vectors on both sides. `queries` of them are searched among all, and all pairs among `paired` of
    them are correlated; both are drawn by a fixed seed if there are more texts.
    """

    texts: int
    queries: int
    paired: int
    candidate: Neighbours
    mixed: Neighbours


def compare(candidate: Vectors, baseline: Vectors) -> Comparison | None:
    """Neighbours among the texts of two arrays [n, d]; None if fewer than three texts have usable vectors on both sides."""
    usable = np.flatnonzero(fidelity.usable(candidate) & fidelity.usable(baseline))
    if len(usable) < 3:
        return None
    random = np.random.default_rng(SEED)
    queries = _drawn(random, len(usable), QUERIES)
    left, right = (
        fidelity.unit_or_zero(vectors if len(usable) == len(vectors) else vectors[usable]) for vectors in (candidate, baseline)
    )
    deepest = min(max(DEPTHS), len(usable) - 1)
    reference = nearest(right[queries], right, deepest, queries)
    pairs = _drawn(random, len(usable), PAIRED)
    rows, columns = np.triu_indices(len(pairs), 1)
    reference_similarities = (right[pairs] @ right[pairs].T)[rows, columns]

    def measured(index: Vectors) -> Neighbours:
        lists = nearest(left[queries], index, deepest, queries)
        shares = {str(depth): shared(lists, reference, min(depth, deepest)) for depth in DEPTHS}
        products = left[pairs] @ index[pairs].T
        # Between queries of one side and an index of the other, a pair has two similarities: either text may be the query.
        similarities = (products[rows, columns] + products[columns, rows]) / 2
        correlation = spearman(similarities, reference_similarities)
        return Neighbours(
            overlap={depth: float(values.mean()) for depth, values in shares.items()},
            interval={depth: bootstrap.of_mean(values) for depth, values in shares.items()},
            spearman=correlation if np.isfinite(correlation) else None,
        )

    return Comparison(len(usable), len(queries), len(pairs), measured(left), measured(right))


def nearest(queries: Vectors, index: Vectors, depth: int, own: NDArray[np.intp] | None = None) -> NDArray[np.intp]:
    """Rows [q, depth] of `index` [n, d] with the largest inner product with each of `queries` [q, d], descending.

    `own` [q] are rows to exclude, one per query: the query itself. Ties are ordered by row. Exact; processes blocks of
    queries, so that products take at most BLOCK_BYTES.
    """
    rows = np.empty((len(queries), depth), np.intp)
    for block in blocks(len(queries), len(index)):
        products = np.asarray(queries[block] @ index.T)
        if own is not None:
            products[np.arange(len(products)), own[block]] = -np.inf
        rows[block] = _best(products, depth)
    return rows


def shared(lists: NDArray[np.intp], reference: NDArray[np.intp], depth: int) -> NDArray[np.float64]:
    """For each row, the share [q] of the first `depth` entries of `reference` among the first `depth` entries of `lists`."""
    same = lists[:, :depth, None] == reference[:, None, :depth]
    return np.asarray(same.any(axis=1).mean(axis=1))


def blocks(queries: int, indexed: int) -> Iterator[slice]:
    """Slices of `queries` small enough that float32 products with all `indexed` vectors fit into BLOCK_BYTES."""
    size = max(1, BLOCK_BYTES // (4 * max(indexed, 1)))
    return (slice(start, min(start + size, queries)) for start in range(0, queries, size))


def _best(products: NDArray[Any], depth: int) -> NDArray[np.intp]:
    if depth < products.shape[1]:
        # Ties are ordered by row, so all rows that tie with the last of the `depth` best compete for its place.
        least = np.partition(products, products.shape[1] - depth, axis=1)[:, -depth]
        chosen = [np.flatnonzero(row >= bound) for row, bound in zip(products, least, strict=True)]
        return np.stack(
            [rows[np.argsort(-row[rows], kind="stable")[:depth]] for row, rows in zip(products, chosen, strict=True)]
        )
    return np.argsort(-products, axis=1, kind="stable")


def _drawn(random: np.random.Generator, count: int, most: int) -> NDArray[np.intp]:
    return np.arange(count) if count <= most else np.sort(random.choice(count, most, replace=False))
