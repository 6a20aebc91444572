"""Vectors computed elsewhere: `.npy`, or Parquet with a column of vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput, MissingExtra
from qembed.installation import how_to_install
from qembed.text.texts import Text

COLUMNS = ("vector", "embedding", "vectors", "embeddings")
MATCHED_BY = ("id", "text")
SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """A file of vectors [n, d]. `rows` maps texts to rows; None: both are in the same order.

    The keys of `rows` are values of the column `matched_by` ("id" or "text").
    """

    path: Path
    vectors: NDArray[np.floating[Any]]
    matched_by: str | None = None
    rows: dict[str, int] | None = None

    def of(self, texts: Sequence[Text]) -> NDArray[np.floating[Any]]:
        """The vectors [len(texts), d] of `texts`, in their order.

        Raises:
            BadInput: the number of vectors and texts differs, or a text has no vector.
        """
        if self.rows is None or self.matched_by is None:
            if len(self.vectors) != len(texts):
                raise BadInput(
                    f"{self.path}: {len(self.vectors)} vectors for {len(texts)} texts; they belong together row by row"
                    " (name the texts with --data)"
                )
            return self.vectors
        keys = [getattr(text, self.matched_by) for text in texts]
        missing = [key for key in keys if key not in self.rows]
        if missing:
            shown = ", ".join(repr(key[:40]) for key in missing[:SHOWN])
            raise BadInput(f"{self.path}: no vector for {len(missing)} of {len(keys)} texts, by {self.matched_by}: {shown}")
        order = [self.rows[key] for key in keys]
        return self.vectors if order == list(range(len(self.vectors))) else self.vectors[order]


def read(path: Path) -> Stored:
    """The vectors of `path`: `.npy` with an array [n, d], or `.parquet` with a column `vector` or `embedding` of lists.

    A Parquet column `id`, or else `text`, assigns vectors to texts; without one, and in `.npy`, they are in the order of the
    texts. An array is memory-mapped, not loaded.

    Raises:
        BadInput: the file cannot be read, or has other content.
        MissingExtra: Parquet without pyarrow.
    """
    kind = path.suffix.lower()
    if kind == ".npy":
        return Stored(path, _array(path))
    if kind in (".parquet", ".pq"):
        return _table(path)
    raise BadInput(f"{path}: vectors are read from .npy (an array [texts, dimensions]) and .parquet (a column 'vector')")


def _array(path: Path) -> NDArray[np.floating[Any]]:
    try:
        # Pickled objects could run code, so they are not read.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise BadInput(f"{path}: not a .npy array: {' '.join(str(error).split())[:120]}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f" or not found.size:
        shape = getattr(found, "shape", None)
        raise BadInput(f"{path}: an array of floats [texts, dimensions] is needed, this is {found.dtype} {shape}")
    return found


def _table(path: Path) -> Stored:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"Parquet needs pyarrow: {how_to_install('parquet')}") from error
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise BadInput(f"{path}: no column {' or '.join(COLUMNS[:2])}; it has {', '.join(names) or 'none'}")
        matched_by = next((name for name in MATCHED_BY if name in names), None)
        vectors: NDArray[np.float32] | None = None
        keys: list[str] = []
        done = 0
        for batch in file.iter_batches(columns=[column, *([matched_by] if matched_by else [])]):
            block = _block(batch.column(0), path, done)
            if vectors is None:
                vectors = np.empty((file.metadata.num_rows, block.shape[1]), np.float32)
            if block.shape[1] != vectors.shape[1]:
                raise BadInput(
                    f"{path}, row {done + 1}: {block.shape[1]} dimensions, the rows before it have {vectors.shape[1]}"
                )
            vectors[done : done + len(block)] = block
            done += len(block)
            keys.extend(_keys(batch.column(1)) if matched_by else ())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except arrow.ArrowException as error:
        raise BadInput(f"{path}: not a Parquet file: {' '.join(str(error).split())[:120]}") from error
    if vectors is None:
        raise BadInput(f"{path}: holds no vectors")
    return Stored(path, vectors, matched_by, {key: row for row, key in enumerate(keys)} if matched_by else None)


def _block(column: Any, path: Path, before: int) -> NDArray[np.float32]:
    """A batch of lists [n][d] as an array [n, d]."""
    rows = column.to_pylist()
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if lengths == {0} or len(lengths) != 1 or None in rows:
        raise BadInput(
            f"{path}, rows {before + 1} to {before + len(rows)}: not all are vectors of one length: {sorted(lengths)}"
        )
    try:
        return np.array(rows, np.float32)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}, rows {before + 1} to {before + len(rows)}: not all are vectors of numbers") from error


def _keys(column: Any) -> Iterator[str]:
    return (str(value) for value in column.to_pylist())
