"""Vectors in Parquet files as `qembed embed` writes them (columns `id`, `vector`, kept columns), read in batches.

int8 vectors need no scale, because only directions count. The bits of binary vectors stand for 1 and −1, so that cosines are in
the order of the number of equal bits. Files from other tools work too: a column of lists of floats of one length; rows without
`id` are numbered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput, MissingExtra
from qembed.installation import how_to_install
from qembed.vectors.stored import COLUMNS

BINARY = "binary"
ABOUT = b"qembed"
ABOUT_INDEX = b"qembed-index"
ID = "id"
IDS = ".ids.parquet"
READ_BYTES = 2 * 2**20  # Arrow takes about ten times as much to assemble a batch of lists
BLOCK_BYTES = 16 * 2**20
TEXT_ROWS = 4096
BUFFER_BYTES = 2**20
NEEDS = f"needs pyarrow and FAISS: {how_to_install('search')}"


@dataclass(frozen=True)
class Corpus:
    """Vectors [rows, dimensions] in the column `vector` of the files `paths`, in that order; `kept` are the other columns.

    `about` is the metadata of `qembed embed` (model, dimensions, dtype, prompt or instruction); empty for other tools' files.
    """

    path: Path
    paths: Sequence[Path]
    about: Mapping[str, Any]
    rows: int
    dimensions: int
    vector: str
    kept: Sequence[str]

    @property
    def packed(self) -> bool:
        """Whether vectors are stored as bits, eight per byte."""
        return self.about.get("dtype") == BINARY

    @property
    def model(self) -> str | None:
        """The model of the vectors; None if the file does not name it."""
        named = self.about.get("model")
        return named if isinstance(named, str) and named else None


def read(path: Path) -> Corpus:
    """Open `path`, a Parquet file or a folder of Parquet files in the order of their names.

    Raises:
        BadInput: no such file; not Parquet; no vectors of one length; or the files of a folder do not belong together.
        MissingExtra: pyarrow is not installed.
    """
    paths = _parts(path)
    parts = [_part(one) for one in paths]
    first = parts[0]
    for other in parts[1:]:
        for what in ("vector", "dimensions", "kept", "model"):
            if getattr(other, what) != getattr(first, what):
                raise BadInput(
                    f"{other.path}: not a part of the same run as {first.path}: its {what} is {getattr(other, what)}, "
                    f"not {getattr(first, what)}"
                )
    rows = sum(part.rows for part in parts)
    if not rows:
        raise BadInput(f"{path}: holds no vectors")
    return Corpus(path, paths, first.about, rows, first.dimensions, first.vector, first.kept)


def vectors(corpus: Corpus) -> Iterator[NDArray[np.float32]]:
    """All vectors in order, as blocks of unit vectors [block, dimensions] float32; only one block is in memory.

    Raises:
        BadInput: a file is damaged, or a row is empty, of another length, zero or not finite.
    """
    waiting: list[NDArray[np.float32]] = []
    for batch in _batches(corpus):
        waiting.append(batch)
        if sum(part.nbytes for part in waiting) >= BLOCK_BYTES:
            yield np.concatenate(waiting)
            waiting.clear()
    if waiting:
        yield np.concatenate(waiting)


def at(corpus: Corpus, positions: NDArray[np.intp]) -> NDArray[np.float32]:
    """The unit vectors [len(positions), dimensions] float32 at `positions` (ascending); reads the file once."""
    found = np.empty((len(positions), corpus.dimensions), np.float32)
    start = taken = 0
    for block in vectors(corpus):
        end = int(np.searchsorted(positions, start + len(block)))
        found[taken:end] = block[positions[taken:end] - start]
        start, taken = start + len(block), end
        if taken == len(positions):
            break
    return found


def others(corpus: Corpus) -> Iterator[Any]:
    """Everything but the vectors, as Arrow tables of at most TEXT_ROWS rows: `id` as strings, then the kept columns.

    Raises:
        BadInput: a file is damaged.
    """
    import pyarrow as arrow
    from pyarrow import compute

    done = 0
    for path in corpus.paths:
        with _opened(path) as file:
            has_id = ID in file.schema_arrow.names
            columns = [*([ID] if has_id else []), *corpus.kept]
            # Even without columns Arrow reports the number of rows of a batch.
            for batch in file.iter_batches(TEXT_ROWS, columns=columns):
                ids = (
                    compute.cast(batch.column(ID), arrow.string())
                    if has_id
                    else arrow.array([str(done + row + 1) for row in range(batch.num_rows)], arrow.string())
                )
                done += batch.num_rows
                yield arrow.table([ids, *(batch.column(name) for name in corpus.kept)], names=[ID, *corpus.kept])


def _batches(corpus: Corpus) -> Iterator[NDArray[np.float32]]:
    """Unit vectors [batch, dimensions] in batches of about READ_BYTES."""
    size = max(1, READ_BYTES // (4 * corpus.dimensions))
    for path in corpus.paths:
        with _opened(path) as file:
            done = 0
            for batch in file.iter_batches(size, columns=[corpus.vector]):
                rows = _rows(batch.column(0), corpus.dimensions // (8 if corpus.packed else 1), path, done)
                if corpus.packed:
                    rows = np.unpackbits(rows.astype(np.uint8), axis=1).astype(np.float32) * 2 - 1
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
    found = sorted(one for one in path.glob("*.parquet") if not one.name.startswith(".") and not one.name.endswith(IDS))
    if not found:
        raise BadInput(f"{path}: a folder without .parquet files")
    return found


def _part(path: Path) -> Corpus:
    with _opened(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        about = note(schema, ABOUT, path)
        if ABOUT_INDEX in (schema.metadata or {}):
            raise BadInput(f"{path}: the ids of an index, without vectors; name the file that `qembed embed` wrote")
        column = next((name for name in COLUMNS if name in schema.names), None)
        if column is None:
            raise BadInput(f"{path}: no column {' or '.join(COLUMNS[:2])}; it has {', '.join(schema.names) or 'none'}")
        dimensions = _dimensions(file, column, about.get("dtype") == BINARY, path)
        kept = [name for name in schema.names if name not in (ID, column)]
        return Corpus(path, [path], about, rows, dimensions, column, kept)


def _dimensions(file: Any, column: str, packed: bool, path: Path) -> int:
    import pyarrow as arrow

    kind = file.schema_arrow.field(column).type
    types = arrow.types
    if not (types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)):
        raise BadInput(f"{path}: the column {column} holds {kind}, not lists of floats")
    value = kind.value_type
    if not (types.is_uint8(value) if packed else types.is_floating(value) or types.is_int8(value)):
        raise BadInput(f"{path}: the column {column} holds lists of {value}, not vectors of float32, float16, int8 or bits")
    if types.is_fixed_size_list(kind):
        found = int(kind.list_size)
    else:
        first = next(file.iter_batches(1, columns=[column]), None)
        row = first.column(0).to_pylist()[0] if first is not None and first.num_rows else []
        found = len(row or [])
    if not found:
        raise BadInput(f"{path}: holds no vectors")
    return found * 8 if packed else found


def note(schema: Any, key: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in a Parquet schema's metadata under `key`; empty if there is none.

    Raises:
        BadInput: the metadata is not a JSON object.
    """
    raw = (schema.metadata or {}).get(key)
    if raw is None:
        return {}
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise BadInput(f"{path}: its note '{key.decode()}' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: its note '{key.decode()}' is no JSON object")
    return found


def _rows(column: Any, dimensions: int, path: Path, before: int) -> NDArray[np.float32]:
    """A batch of lists as an array [n, dimensions] float32."""
    from pyarrow import compute

    # A null list has no length, even in a column of fixed-size lists.
    lengths = compute.fill_null(compute.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    if (lengths != dimensions).any():
        row = int(np.argmax(lengths != dimensions))
        raise BadInput(f"{path}, row {before + row + 1}: {int(lengths[row])} dimensions, not {dimensions}")
    values = column.flatten()
    if values.null_count:
        missing = np.argmax(compute.is_null(values).to_numpy(zero_copy_only=False))
        raise BadInput(f"{path}, row {before + int(missing) // dimensions + 1}: a number of the vector is missing")
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float32).reshape(-1, dimensions)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open Parquet file, read through a small buffer; errors are raised as BadInput."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"Parquet {NEEDS}") from error
    try:
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except OSError as error:
        if error.strerror is None:  # Arrow's error for bytes that are not Parquet
            raise BadInput(f"{path}: damaged: {_words(error)}") from error
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except arrow.ArrowException as error:
        raise BadInput(f"{path}: not a Parquet file, or damaged: {_words(error)}") from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
