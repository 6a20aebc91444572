"""Vectors in Parquet files as `qembed embed` writes them (columns `id`, `vector`, kept columns), read in batches.

int8 vectors need no scale, because only directions count. The bits of binary vectors stand for 1 and −1, so that cosines are in
the order of the number of equal bits. Files from other tools work too: a column of lists of floats of one length; rows without
`id` are numbered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput
from qembed.vectors import parquet
from qembed.vectors.parquet import VectorColumn

ABOUT_INDEX = b"qembed-index"
ID = "id"
IDS = ".ids.parquet"
BLOCK_BYTES = 16 * 2**20
TEXT_ROWS = 4096


@dataclass(frozen=True)
class Corpus:
    """Vectors [rows, dimensions] in the column `vector` of the files `paths`, in that order.

    `other_columns` are the names of the remaining columns, without the id.
    """

    path: Path
    paths: Sequence[Path]
    rows: int
    vector: VectorColumn
    other_columns: Sequence[str]

    @property
    def about(self) -> Mapping[str, Any]:
        """The metadata of `qembed embed` (model, dimensions, dtype, prompt or instruction); empty for other tools' files."""
        return self.vector.metadata

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return self.vector.dimensions

    @property
    def model(self) -> str | None:
        """The model of the vectors; None if the file does not name it."""
        model = self.about.get("model")
        return model if isinstance(model, str) and model else None


def read(path: Path) -> Corpus:
    """Open `path`, a Parquet file or a folder of Parquet files in the order of their names.

    Raises:
        BadInput: no such file; not Parquet; no vectors of one length; or the files of a folder do not belong together.
        MissingExtra: pyarrow is not installed.
    """
    paths = _parts(path)
    parts = [_part(file) for file in paths]
    first = parts[0]
    for other in parts[1:]:
        for what, own, expected in (
            ("column of vectors", other.vector.name, first.vector.name),
            ("dimensions", other.dimensions, first.dimensions),
            ("dtype", other.vector.dtype, first.vector.dtype),
            ("other columns", other.other_columns, first.other_columns),
            ("model", other.model, first.model),
        ):
            if own != expected:
                raise BadInput(f"{other.path}: not a part of the same run as {first.path}: {what}: {own}, not {expected}")
    rows = sum(part.rows for part in parts)
    if not rows:
        raise BadInput(f"{path}: holds no vectors")
    return Corpus(path, paths, rows, first.vector, first.other_columns)


def vectors(corpus: Corpus) -> Iterator[NDArray[np.float32]]:
    """All vectors in order, as blocks of unit vectors [block, dimensions] float32; only one block is in memory.

    Raises:
        BadInput: a file is damaged, or a row is empty, of another length, zero or not finite.
    """
    pending: list[NDArray[np.float32]] = []
    for batch in _batches(corpus):
        pending.append(batch)
        if sum(part.nbytes for part in pending) >= BLOCK_BYTES:
            yield np.concatenate(pending)
            pending.clear()
    if pending:
        yield np.concatenate(pending)


def at(corpus: Corpus, positions: NDArray[np.intp]) -> NDArray[np.float32]:
    """The unit vectors [len(positions), dimensions] float32 at `positions` (ascending); reads the file once."""
    sample = np.empty((len(positions), corpus.dimensions), np.float32)
    start = filled = 0
    for block in vectors(corpus):
        end = int(np.searchsorted(positions, start + len(block)))
        sample[filled:end] = block[positions[filled:end] - start]
        start, filled = start + len(block), end
        if filled == len(positions):
            break
    return sample


def others(corpus: Corpus) -> Iterator[Any]:
    """Everything but the vectors, as Arrow tables of at most TEXT_ROWS rows: `id` as strings, then the kept columns.

    Raises:
        BadInput: a file is damaged.
    """
    import pyarrow as arrow

    done = 0
    for path in corpus.paths:
        start = done
        with parquet.opened(path) as file:
            has_id = ID in file.schema.names
            columns = [*([ID] if has_id else []), *corpus.other_columns]
            # Even without columns Arrow reports the number of rows of a batch.
            for batch in parquet.batches(file, TEXT_ROWS, columns):
                numbers = map(str, range(done + 1, done + batch.num_rows + 1))
                ids = parquet.ids(batch.column(ID), path, done - start, ID in file.uuids) if has_id else list(numbers)
                done += batch.num_rows
                other_columns = (batch.column(name) for name in corpus.other_columns)
                yield arrow.table([arrow.array(ids, arrow.string()), *other_columns], names=[ID, *corpus.other_columns])


def _batches(corpus: Corpus) -> Iterator[NDArray[np.float32]]:
    """Unit vectors [batch, dimensions] in batches."""
    for path in corpus.paths:
        with parquet.opened(path) as file:
            done = 0
            for batch in parquet.batches(file, corpus.vector.batch_rows, [corpus.vector.name]):
                rows = parquet.vectors(batch.column(0), corpus.vector, path, done)
                lengths = np.linalg.norm(rows, axis=1)
                if not (good := np.isfinite(lengths) & (lengths > 0)).all():
                    raise BadInput(f"{path}, row {done + int(np.argmin(good)) + 1}: the vector is zero or not finite")
                done += len(rows)
                yield (rows / lengths[:, None]).astype(np.float32)


def _parts(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix.lower() not in (".parquet", ".pq"):
            raise BadInput(
                f"{path}: vectors are read from .parquet, as `qembed embed … -o {path.stem or 'out'}.parquet` writes it"
            )
        return [path]
    files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith(".") and not file.name.endswith(IDS))
    if not files:
        raise BadInput(f"{path}: a folder without .parquet files")
    return files


def _part(path: Path) -> Corpus:
    with parquet.opened(path) as file:
        schema = file.schema
        if ABOUT_INDEX in (schema.metadata or {}):
            raise BadInput(f"{path}: the ids of an index, without vectors; name the file that `qembed embed` wrote")
        column = parquet.vector_column(file, path)
        other_columns = [name for name in schema.names if name not in (ID, column.name)]
        return Corpus(path, [path], file.rows, column, other_columns)
