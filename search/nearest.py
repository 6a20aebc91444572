"""Nearest rows of an index, at a given search width or exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.search.build import Kind
from qembed.vectors import ivf

WIDTH = {"ivf-flat": "nprobe", "hnsw": "ef_search"}  # FAISS's parameter for the search width

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


def nearest(index: Any, kind: Kind, queries: Floats, depth: int, width: int | None) -> tuple[Floats, Rows]:
    """Cosines and rows [q, depth] of the nearest to `queries` [q, d] (unit vectors), best first; row −1 if fewer are found.

    `width` is `nprobe` for IVF-Flat and `ef_search` for HNSW; None compares with every vector.
    """
    faiss = ivf.library()
    queries = np.ascontiguousarray(queries, np.float32)
    if kind == "ivf-flat":
        nprobe = index.nlist if width is None else min(width, index.nlist)
        answer = index.search(queries, depth, params=faiss.SearchParametersIVF(nprobe=nprobe))
    elif kind == "hnsw" and width is not None:
        answer = index.search(queries, depth, params=faiss.SearchParametersHNSW(efSearch=max(width, depth)))
    else:
        answer = (faiss.downcast_index(index.storage) if kind == "hnsw" else index).search(queries, depth)
    return answer


def widths(index: Any, kind: Kind, depth: int) -> list[int]:
    """Search widths to measure, ascending: powers of two up to all clusters, or up to 1,024 candidates."""
    least, most = (1, int(index.nlist)) if kind == "ivf-flat" else (depth, min(1024, max(depth, int(index.ntotal))))
    return sorted({least, most, *(2**power for power in range(31) if least < 2**power < most)})
