"""Reads files of stored vectors: all formats that `qembed embed` writes, and arrays and tables of other tools."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput
from qembed.text.display import counted
from qembed.text.rows.reader import FIXED, opened
from qembed.text.rows.values import NoId, id_text
from qembed.vectors import dtypes, parquet
from qembed.vectors.matching import VectorFile, repeated_keys
from qembed.vllm import machine

MATCHED_BY = ("id", "text")
BLOCK = 1024
DECIMAL = "decimal numbers"
"""The dtype of numbers written as text, which does not tell how many bits they had."""
BITS_ADVICE = "which does not tell whether these are packed bits; embed into .parquet, which does"

Floats = NDArray[np.float32]


def read(path: Path) -> VectorFile:
    """The vectors of `path`, by its suffix.

    `.npy` is an array [n, d]; `.fvecs` has float32 vectors behind their lengths. Ids stand beside both in OUT.ids.jsonl if
    `qembed embed` wrote them. `.parquet`, `.jsonl` and `.csv` have a column `vector` or `embedding` of lists. Their column
    `id`, or else `text`, assigns vectors to texts; without either the vectors are in the order of the texts.

    int8 and binary vectors become float32; an array of floats is memory-mapped, not loaded.

    Raises:
        BadInput: the file cannot be read, has other content, may hold packed bits, or two of its rows have the same id.
        MissingExtra: Parquet without pyarrow.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path}: vectors are read from {', '.join(READERS)}, as qembed embed writes them")
    return reader(path)


def _npy(path: Path) -> VectorFile:
    try:
        # Pickled objects could run code, so they are not read.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise BadInput(f"{path}: not a .npy array: {' '.join(str(error).split())[:120]}") from error
    needed = f"{path}: an array [texts, dimensions] of floats or int8 is needed"
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not array.size:
        raise BadInput(f"{needed}, this has the shape {getattr(array, 'shape', None)}")
    if array.dtype == np.uint8:
        raise BadInput(f"{needed}, this is uint8, {BITS_ADVICE}")
    if array.dtype.kind != "f" and array.dtype != np.int8:
        raise BadInput(f"{needed}, this is {array.dtype}")
    vectors = dtypes.decode(array, "int8") if array.dtype == np.int8 else array
    return _with_ids(path, vectors, str(array.dtype))


def _fvecs(path: Path) -> VectorFile:
    """Each vector is its length (int32) and its numbers (float32), little-endian."""
    try:
        words = np.memmap(path, "<i4", "r") if path.stat().st_size else np.empty(0, "<i4")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"{path}: not .fvecs: its size is no multiple of 4 bytes") from error
    if not words.size:
        raise BadInput(f"{path}: holds no vectors")
    width = int(words[0]) + 1
    if width < 2 or words.size % width or (words[::width] != words[0]).any():
        raise BadInput(f"{path}: not .fvecs, or not whole: each vector begins with the same length")
    return _with_ids(path, words.reshape(-1, width).view("<f4")[:, 1:], "float32")


def _with_ids(path: Path, vectors: NDArray[np.floating[Any]], dtype: str) -> VectorFile:
    """The vectors with the ids in the file that `qembed embed` writes beside them, if it is there."""
    ids_path = path.with_name(path.with_suffix("").name + ".ids.jsonl")
    if not ids_path.exists():
        return VectorFile(path, vectors, dtype)
    with opened(ids_path, "jsonl", FIXED) as records:
        keys = [_key(_valid(record), "id", record.place) for record in records.read({})]
    if len(keys) != len(vectors):
        sizes = f"{counted(len(keys), 'id')}, {path.name} has {counted(len(vectors), 'vector')}"
        raise BadInput(f"{ids_path}: {sizes}: they are not of the same run")
    _check_keys(keys, vectors, "id", ids_path)
    return VectorFile(path, vectors, dtype, "id", keys)


def _parquet(path: Path) -> VectorFile:
    with parquet.opened(path) as file:
        column = parquet.vector_column(file, path)
        matched_by = next((name for name in MATCHED_BY if name in file.schema.names), None)
        rows = file.rows
        if not rows:
            raise BadInput(f"{path}: holds no vectors")
        size, free = rows * column.dimensions * 4, machine.host().free
        if free is not None and size > free:
            raise BadInput(f"{path}: {rows:,} vectors take {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
        vectors = np.empty((rows, column.dimensions), np.float32)
        keys: list[str] = []
        done = 0
        columns = [column.name, *([matched_by] if matched_by else [])]
        for batch in parquet.batches(file, column.batch_rows, columns):
            block = parquet.vectors(batch.column(column.name), column, path, done)
            if matched_by:
                keys += parquet.ids(batch.column(matched_by), path, done, matched_by in file.uuids)
            vectors[done : done + len(block)] = block
            done += len(block)
    if matched_by is None:
        return VectorFile(path, vectors, column.dtype)
    _check_keys(keys, vectors, matched_by, path)
    return VectorFile(path, vectors, column.dtype, matched_by, keys)


def _lines(path: Path) -> VectorFile:
    """JSON lines, or CSV with the vector as "[0.1,0.2]"."""
    keys: list[str] = []
    blocks: list[NDArray[np.float64]] = []
    rows: list[NDArray[np.float64]] = []
    matched_by: str | None = None
    name, width = "", 0
    for place, values in _records(path):
        if not name:
            name = next((column for column in parquet.COLUMNS if column in values), "")
            matched_by = next((column for column in MATCHED_BY if column in values), None)
            if not name:
                raise BadInput(f"{place}: no {' or '.join(parquet.COLUMNS[:2])}; it has {', '.join(values) or 'none'}")
        vector = _numbers(values.get(name), place)
        width = width or len(vector)
        if len(vector) != width:
            raise BadInput(f"{place}: {counted(len(vector), 'number')}, not {width}: vectors have one length")
        rows.append(vector)
        keys += [_key(values, matched_by, place)] if matched_by else []
        if len(rows) == BLOCK:
            blocks.append(np.stack(rows))
            rows = []
    blocks += [np.stack(rows)] if rows else []
    if not blocks:
        raise BadInput(f"{path}: holds no vectors")
    dtype = _written_dtype(blocks, path)
    vectors = np.concatenate([block.astype(np.float32) for block in blocks])
    if matched_by is None:
        return VectorFile(path, vectors, dtype)
    _check_keys(keys, vectors, matched_by, path)
    return VectorFile(path, vectors, dtype, matched_by, keys)


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Location and values of each row of JSON lines or CSV."""
    columns = dict.fromkeys((*MATCHED_BY, *parquet.COLUMNS), "")
    with opened(path, None, FIXED, columns) as records:
        for record in records.read(columns):
            yield record.place, _valid(record)


def _valid(record: Any) -> Mapping[str, Any]:
    if record.reason:
        raise BadInput(f"{record.place}: {record.reason}")
    values: Mapping[str, Any] = record.values
    return values


def _numbers(value: Any, place: str) -> NDArray[np.float64]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, list) and value and all(type(number) in (int, float) for number in value):
            return np.array(value, np.float64)
    except (ValueError, RecursionError, OverflowError):
        pass
    raise BadInput(f"{place}: the vector is not a list of numbers")


def _written_dtype(blocks: Sequence[NDArray[np.float64]], path: Path) -> str:
    """What numbers that were written as text are: int8 if all are such integers and one is negative, else decimal numbers.

    Raises:
        BadInput: they are integers from 0 to 255, which may be packed bits.
    """
    whole = all((block == np.rint(block)).all() for block in blocks)
    low, high = min(block.min() for block in blocks), max(block.max() for block in blocks)
    if whole and low >= 0 and high <= 255:
        raise BadInput(f"{path}: its vectors are integers from 0 to 255 in a text file, {BITS_ADVICE}")
    return "int8" if whole and low >= -128 and high <= 127 else DECIMAL


def _key(values: Mapping[str, Any], column: str, place: str) -> str:
    """The id or text of a row, named as the readers of rows name it."""
    try:
        key = id_text(values.get(column))
    except NoId as error:
        raise BadInput(f"{place}: the {column} {values[column]!r} cannot be one: {error}") from error
    if key is None:
        raise BadInput(f"{place}: no {column}")
    return key


def _check_keys(keys: Sequence[str], vectors: NDArray[np.floating[Any]], matched_by: str, path: Path) -> None:
    """Refuse keys that name more than one vector. A text may be repeated if its vectors are equal."""
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        before = first.setdefault(key, row)
        if before != row and (matched_by == "id" or not np.array_equal(vectors[before], vectors[row], equal_nan=True)):
            raise BadInput(
                f"{path}: {counted(len(repeated_keys(keys)), matched_by)} in more than one row, first {key[:40]!r} in rows"
                f" {before + 1} and {row + 1}; each is to have one vector"
            )


READERS = {".parquet": _parquet, ".pq": _parquet, ".npy": _npy, ".fvecs": _fvecs, ".jsonl": _lines, ".csv": _lines}
