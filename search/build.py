"""Builds a FAISS index over unit vectors, so that an inner product is a cosine. FAISS's ids are the row numbers.

Flat compares with every vector. IVF-Flat (Jégou et al. 2011) compares with the vectors of the `nprobe` nearest of `nlist`
clusters. HNSW (Malkov & Yashunin 2018) searches a graph of near neighbours with `ef_search` candidates. All three store
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput, QembedError
from qembed.search import corpus as corpora
from qembed.search.corpus import Corpus
from qembed.text.display import counted
from qembed.vectors import ivf

Kind = Literal["flat", "ivf-flat", "hnsw"]
KINDS: tuple[Kind, ...] = ("flat", "ivf-flat", "hnsw")
M, EF_CONSTRUCTION = 32, 200
SPARE_BYTES = 200 * 2**20

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class IndexSettings:
    """The kind of index; `nlist` clusters (None: 4·√rows), `m` links per node, `ef_construction` candidates while linking."""

    kind: Kind = "flat"
    nlist: int | None = None
    m: int = M
    ef_construction: int = EF_CONSTRUCTION

    def noted(self, rows: int) -> dict[str, Any]:
        """The settings that apply to this kind, for `rows` vectors."""
        if self.kind == "ivf-flat":
            return {"nlist": clusters(rows, self.nlist)}
        return {"m": self.m, "ef_construction": self.ef_construction} if self.kind == "hnsw" else {}


def clusters(rows: int, nlist: int | None) -> int:
    """Number of clusters of an IVF index of `rows` vectors: `nlist`, or a default.

    Raises:
        BadInput: `nlist` exceeds the number of vectors.
    """
    if nlist is None:
        return ivf.clusters(rows)
    if nlist > rows:
        raise BadInput(f"--nlist {nlist}: there are only {counted(rows, 'vector')}")
    return nlist


def memory(rows: int, dimensions: int, settings: IndexSettings) -> int:
    """Bytes of the index, in memory and on disk: float32 vectors, and row numbers or links."""
    extra = {"flat": 0, "ivf-flat": 8, "hnsw": 4 * (2 * settings.m + 1) + 12}[settings.kind]
    return rows * (4 * dimensions + extra)


def check_memory(corpus: Corpus, settings: IndexSettings) -> None:
    """Check that the index fits into free memory.

    Raises:
        QembedError: it does not; the message has both sizes.
    """
    from qembed.vllm import machine

    free = machine.host().free
    needed = memory(corpus.rows, corpus.dimensions, settings) + SPARE_BYTES
    if free is not None and needed > free:
        raise QembedError(
            f"{corpus.path}: {corpus.rows:,} vectors of {corpus.dimensions} dimensions need {needed / 1e9:.1f} GB as an index, "
            f"{free / 1e9:.1f} GB are free; embed with fewer --dimensions, or use a database (docs/vector-databases.md)"
        )


def build(
    corpus: Corpus, settings: IndexSettings, drawn: NDArray[np.intp], on_stage: Callable[[str, int], None]
) -> tuple[Any, Floats]:
    """Build the index; returns it with the vectors [len(drawn), dimensions] at the rows `drawn` (ascending).

    `on_stage` is called with (name of the stage, finished rows).

    Raises:
        BadInput: a row is not a usable vector.
        MissingExtra: FAISS is not installed.
    """
    index = _empty(corpus, settings, on_stage)
    samples: list[Floats] = []
    done = 0
    for block in _counted(corpus, on_stage):
        index.add(block)
        inside = drawn[(drawn >= done) & (drawn < done + len(block))]
        samples.append(block[inside - done])
        done += len(block)
    if done != corpus.rows:
        raise BadInput(f"{corpus.path}: {done:,} rows, its footer says {corpus.rows:,}: it was changed while it was read")
    return index, np.concatenate(samples)


def _empty(corpus: Corpus, settings: IndexSettings, on_stage: Callable[[str, int], None]) -> Any:
    faiss = ivf.library()
    if settings.kind == "hnsw":
        index = faiss.IndexHNSWFlat(corpus.dimensions, settings.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = settings.ef_construction
        _reserve(faiss.downcast_index(index.storage), corpus)
        return index
    if settings.kind == "flat":
        index = faiss.IndexFlatIP(corpus.dimensions)
        _reserve(index, corpus)
        return index
    count = clusters(corpus.rows, settings.nlist)
    rows = ivf.training_rows(corpus.rows, count)
    on_stage(f"drawing {len(rows):,} vectors to find {count:,} clusters", 0)
    sample = corpora.at(corpus, rows)
    on_stage(f"finding {count:,} clusters", 0)
    return ivf.trained(corpus.dimensions, count, sample)


def _reserve(flat: Any, corpus: Corpus) -> None:
    """Reserve memory for all vectors in one step: growing by doubling would briefly take up to three times as much."""
    flat.codes.resize(corpus.rows * 4 * corpus.dimensions)
    flat.codes.resize(0)


def _counted(corpus: Corpus, on_stage: Callable[[str, int], None]) -> Iterator[Floats]:
    done = 0
    for block in corpora.vectors(corpus):
        on_stage("indexing", done)
        yield block
        done += len(block)
    on_stage("indexing", done)
