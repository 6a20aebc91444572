"""FAISS's IVF-Flat over unit vectors (Jégou et al. 2011), so that an inner product is a cosine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import MissingExtra
from qembed.installation import how_to_install

CLUSTERS_PER_ROOT = 4
POINTS_PER_CLUSTER = 39
"""FAISS warns below as many training vectors per cluster."""
TRAINED_PER_CLUSTER = 128
SEED = 0


def library() -> Any:
    """FAISS.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise MissingExtra(f"an index needs faiss-cpu and pyarrow: {how_to_install('search')}") from error
    return faiss


def clusters(rows: int) -> int:
    """Number of clusters for `rows` vectors: 4·√rows, fewer if they would be too small to train."""
    return max(1, min(int(CLUSTERS_PER_ROOT * rows**0.5), rows // POINTS_PER_CLUSTER))


def training_rows(rows: int, count: int) -> NDArray[np.intp]:
    """Row numbers, ascending, of the training vectors for `count` clusters: a sample of `rows` by a fixed seed, or all rows."""
    return draw(rows, TRAINED_PER_CLUSTER * count)


def draw(rows: int, count: int) -> NDArray[np.intp]:
    """`count` of the numbers below `rows`, ascending, by a fixed seed; all of them if there are no more."""
    if count >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(SEED).choice(rows, count, replace=False))


def trained(dimensions: int, count: int, sample: NDArray[np.float32]) -> Any:
    """An empty index of `count` clusters, found by spherical k-means in `sample` [n, dimensions] (`training_rows`)."""
    faiss = library()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, count, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True  # cluster centres as unit vectors: nearest by the measure that is searched with
    index.cp.min_points_per_centroid = 1  # otherwise it warns on stderr about small collections
    index.train(sample)
    return index
