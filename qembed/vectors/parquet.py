"""Vectors in Parquet files: which column holds them, in which format, and their rows as float32.

`qembed embed` records the format in the schema's metadata (`qembed`: {"dtype": …, "dimensions": …}); files of other tools have
none and are read by the type of their column. A file whose column is not what the metadata says is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput
from qembed.parquet.file import TOO_LARGE, ParquetFile, opened
from qembed.text.display import counted
from qembed.text.rows.arrow import UNDECODABLE, python_values
from qembed.text.rows.lines import NOT_UTF8
from qembed.text.rows.values import NoId, id_text
from qembed.vectors import dtypes

COLUMNS = ("vector", "embedding", "vectors", "embeddings")
METADATA = b"qembed"
FLOATS = {"float": "float32", "halffloat": "float16", "double": "float64"}
"""Arrow's names of float types, and numpy's. Another tool may have widened or shortened them, which their numbers survive."""
UNRECORDED = {**FLOATS, "int8": "int8"}
"""Formats that an element type alone tells. Not uint8: packed bits and integers from 0 to 255 look the same."""
RECORDED = {**{dtype: tuple(FLOATS) for dtype in FLOATS.values()}, "int8": ("int8",), "binary": ("uint8",)}
"""Element types by the format that the metadata records."""
READ_BYTES = 2 * 2**20
"""Bytes of vectors in a batch; Arrow takes about ten times as much to assemble it."""

__all__ = ["batches", "ids", "metadata", "opened", "vector_column", "vectors"]


@dataclass(frozen=True)
class VectorColumn:
    """A column of vectors. `dtype` is one of `dtypes.DTYPES`, or "float64"; `metadata` is that of `qembed embed`, or empty."""

    name: str
    dtype: str
    dimensions: int
    metadata: Mapping[str, Any]

    @property
    def batch_rows(self) -> int:
        """Rows of a batch of about READ_BYTES."""
        return max(1, READ_BYTES // (4 * self.dimensions))

    @property
    def width(self) -> int:
        """The number of elements of a stored vector."""
        return self.dimensions // (dtypes.BITS if self.dtype == "binary" else 1)


def metadata(schema: Any, key: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in a Parquet schema's metadata under `key`; empty if there is none.

    Raises:
        BadInput: the metadata is not a JSON object.
    """
    raw = (schema.metadata or {}).get(key)
    if raw is None:
        return {}
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: its metadata '{key.decode()}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: its metadata '{key.decode()}' is not a JSON object")
    return value


def vector_column(file: ParquetFile, path: Path) -> VectorColumn:
    """The column of vectors of an open Parquet file.

    Raises:
        BadInput: there is none, it holds no vectors, its format is not known, or is not the one that the metadata records.
    """
    schema = file.schema
    name = next((name for name in COLUMNS if name in schema.names), None)
    if name is None:
        raise BadInput(f"{path}: no column {' or '.join(COLUMNS[:2])}; it has {', '.join(schema.names) or 'none'}")
    recorded = metadata(schema, METADATA, path)
    dtype = _dtype(schema.field(name).type, recorded, f"{path}: the column {name}")
    width = _width(file, name)
    if not width:
        raise BadInput(f"{path}: holds no vectors")
    dimensions = width * (dtypes.BITS if dtype == "binary" else 1)
    promised = recorded.get("dimensions")
    if promised is not None and promised != dimensions:
        raise BadInput(f"{path}: vectors of {dimensions} dimensions ({dtype}), its metadata says {promised}")
    return VectorColumn(name, dtype, dimensions, recorded)


def vectors(column: Any, described: VectorColumn, path: Path, before: int) -> NDArray[np.float32]:
    """An Arrow array of lists as vectors [n, dimensions] float32, neither scaled nor checked for zeros and NaN.

    `before` is the number of rows before these, for messages.

    Raises:
        BadInput: a row has no vector or one of another length, or a number is missing.
    """
    from pyarrow import compute

    width = described.width
    # A null list has no length, even in a column of fixed-size lists.
    lengths = compute.fill_null(compute.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        row = int(np.argmax(lengths != width))
        length = counted(int(lengths[row]), "number")
        raise BadInput(f"{path}, row {before + row + 1}: {length}, not {width}: vectors have one length")
    values = column.flatten()
    if values.null_count:
        missing = np.argmax(compute.is_null(values).to_numpy(zero_copy_only=False))
        raise BadInput(f"{path}, row {before + int(missing) // width + 1}: a number of the vector is missing")
    return dtypes.decode(values.to_numpy(zero_copy_only=False).reshape(-1, width), described.dtype)


def ids(column: Any, path: Path, before: int, is_uuid: bool = False) -> list[str]:
    """An Arrow array of ids as strings, named as the readers of rows name them (`id_text`); `is_uuid`: bytes are UUIDs.

    Raises:
        BadInput: a row has no id, or a value that cannot be one.
    """
    names = []
    for row, value in enumerate(python_values(column, is_uuid), before + 1):
        if value is UNDECODABLE:
            raise BadInput(f"{path}, row {row}: the id is {NOT_UTF8}")
        try:
            name = id_text(value)
        except NoId as error:
            raise BadInput(f"{path}, row {row}: the id {value!r} cannot be one: {error}") from error
        if name is None:
            raise BadInput(f"{path}, row {row}: no id")
        names.append(name)
    return names


def _dtype(kind: Any, recorded: Mapping[str, Any], where: str) -> str:
    from pyarrow import types

    if not (types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)):
        raise BadInput(f"{where} holds {kind}, not lists of numbers")
    element = str(kind.value_type)
    dtype = recorded.get("dtype")
    if dtype is None:
        if element not in UNRECORDED:
            advice = "; qembed embed records that it stores bits" if element == "uint8" else ""
            raise BadInput(f"{where} holds lists of {element}, not vectors of float32, float16, float64 or int8{advice}")
        return UNRECORDED[element]
    if not isinstance(dtype, str) or element not in RECORDED.get(dtype, ()):
        raise BadInput(f"{where} holds lists of {element}, its metadata says {dtype}: not what qembed embed wrote")
    return FLOATS.get(element, dtype)


def _width(file: ParquetFile, name: str) -> int:
    """The number of elements of the first vector; 0 if there is none."""
    from pyarrow import compute, types

    kind = file.schema.field(name).type
    if types.is_fixed_size_list(kind):
        return int(kind.list_size)
    first = next(batches(file, 1, [name]), None)
    lengths = [] if first is None else compute.list_value_length(first.column(0)).to_pylist()
    return next(iter(lengths), None) or 0


def batches(file: ParquetFile, rows: int, columns: Sequence[str]) -> Iterator[Any]:
    """Arrow record batches of at most `rows` rows.

    Raises:
        BadInput: the file is damaged, or a row is larger than is read.
    """
    done = 0
    for batch in file.batches(rows, columns):
        if batch is None:
            raise BadInput(f"{file.name}, row {done + 1}: {TOO_LARGE}")
        yield batch
        done += batch.num_rows
