"""Parquet that grows by row groups and survives SIGKILL.

A Parquet file has its index at the end, so an unfinished file can be neither read nor continued. Here each window is a row
group that Arrow writes to a scratch file, at the offset that it will have in the output, so that all offsets in its index are
correct. The row group is appended to the output and its index is kept separately; at the end the indices are merged.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qembed.embed.outputs import CHUNK_COLUMNS, INDEX, VECTORS, Output, VectorBlock, VectorLayout
from qembed.errors import QembedError
from qembed.text import strict_json

MAGIC = b"PAR1"
TYPES = "types.json"
LENGTH = 4
INTEGERS = {"int64": range(-(2**63), 2**63), "float64": range(-(2**53), 2**53 + 1)}
"""The integers that a column of the type can hold; beyond 2^53 a float may lose the last digits."""


class Parquet(Output):
    """Columns id (string), vector (fixed-size list), and the others; the schema's metadata has the key `qembed`."""

    files = (VECTORS, INDEX, TYPES)

    def __init__(self, folder: Path, shape: VectorLayout, sizes: Mapping[str, int]) -> None:
        super().__init__(folder, shape, sizes)
        self.open[TYPES].seek(0)
        written = self.open[TYPES].read()
        self._types: dict[str, str] | None = json.loads(written) if written else None

    def unfit(self, block: VectorBlock) -> dict[int, str]:
        """Rows with a value that its column cannot hold; the first window decides a column's type."""
        reasons: dict[int, str] = {}
        for name, column_type in (self._types or {}).items():
            if name not in CHUNK_COLUMNS:
                reasons |= {index: f"{name} is {reason}" for index, reason in unfit(block.columns[name], column_type).items()}
        return reasons

    def write(self, block: VectorBlock) -> None:
        """Append a row group."""
        if self._types is None:
            self._types = {name: type_of(values) for name, values in block.columns.items()}
            self.open[TYPES].write(json.dumps(self._types).encode())
        out = self.open[VECTORS]
        if not out.tell():
            out.write(MAGIC)
        arrow_table = table(block, schema(self.shape, self._types), self.shape)
        group, index = row_group(arrow_table, out.tell(), self.folder / "group")
        out.write(group)
        self.open[INDEX].write(len(index).to_bytes(LENGTH, "little") + index)

    def finish(self, rows: int) -> None:
        """Write the merged index after the last row group."""
        import pyarrow.parquet as parquet

        out, index = self.open[VECTORS], self.open[INDEX]
        if not rows:
            out.truncate(0)
            out.seek(0)
            types = dict.fromkeys(self.shape.columns, "string")
            opened_writer(out, schema(self.shape, types)).close()
            return
        index.seek(0)
        merged: Any = None
        while head := index.read(LENGTH):
            group = parquet.read_metadata(io.BytesIO(_as_file(index.read(int.from_bytes(head, "little")))))
            if merged is None:
                merged = group
            else:
                merged.append_row_groups(group)
        footer = io.BytesIO()
        merged.write_metadata_file(footer)
        last = merged.row_group(merged.num_row_groups - 1)
        ends = [_end(last.column(number)) for number in range(last.num_columns)]
        out.seek(max(ends))
        out.truncate()
        out.write(footer.getvalue()[len(MAGIC) :])


def _end(column: Any) -> int:
    begin = column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
    return begin + column.total_compressed_size


def _as_file(footer: bytes) -> bytes:
    return MAGIC + footer + len(footer).to_bytes(4, "little") + MAGIC


def row_group(arrow_table: Any, offset: int, scratch: Path) -> tuple[bytes, bytes]:
    """A table as a row group for byte `place` of a file, and the index of a file with this row group only.

    Raises:
        QembedError: this version of Arrow lays out row groups differently.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with pyarrow.OSFile(str(scratch), "wb") as file:
            writer = opened_writer(file, arrow_table.schema)
            os.lseek(file.fileno(), offset, os.SEEK_SET)  # a hole in the file takes no disk space
            writer.write_table(arrow_table, row_group_size=len(arrow_table))
            writer.close()
        with scratch.open("rb") as written:
            first = parquet.read_metadata(written).row_group(0).column(0)
            if first.data_page_offset != offset:
                raise QembedError(
                    f"Parquet cannot be written with pyarrow {pyarrow.__version__}: it lays out row groups differently"
                )
            end = written.seek(-8, os.SEEK_END)
            length = int.from_bytes(written.read(4), "little")
            written.seek(offset)
            return written.read(end - length - offset), written.read(length)
    finally:
        scratch.unlink(missing_ok=True)


def whole_file(arrow_table: Any) -> bytes:
    """A table as a Parquet file of one row group."""
    out = io.BytesIO()
    with opened_writer(out, arrow_table.schema) as writer:
        writer.write_table(arrow_table, row_group_size=max(len(arrow_table), 1))
    return out.getvalue()


def opened_writer(file: Any, arrow_schema: Any) -> Any:
    """Arrow's writer of files with this schema. Vectors stay uncompressed: they hardly shrink."""
    import pyarrow.parquet as parquet

    plain = [name for name in arrow_schema.names if name != "vector"]
    compression = {**dict.fromkeys(plain, "zstd"), "vector.list.element": "none"}
    return parquet.ParquetWriter(file, arrow_schema, use_dictionary=False, write_statistics=plain, compression=compression)


def schema(shape: VectorLayout, types: Mapping[str, str]) -> Any:
    """The Arrow schema of the output; `types` of the other columns are named as by `type_of`."""
    import pyarrow as arrow

    vector = arrow.list_(arrow.from_numpy_dtype(shape.element), shape.width)
    fields = [
        arrow.field("id", arrow.string(), nullable=False),
        arrow.field("vector", vector, nullable=False),
        *(arrow.field(name, getattr(arrow, CHUNK_COLUMNS.get(name, types[name]))()) for name in shape.columns),
    ]
    return arrow.schema(fields, metadata={b"qembed": json.dumps(dict(shape.about)).encode()})


def table(block: VectorBlock, arrow_schema: Any, shape: VectorLayout) -> Any:
    """A window as an Arrow table with this schema."""
    import pyarrow as arrow

    vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(block.vectors.reshape(-1)), shape.width)
    columns = [
        arrow.array([_as(value, arrow.types.is_string(column_type)) for value in values], column_type)
        for column_type, values in ((arrow_schema.field(name).type, values) for name, values in block.columns.items())
    ]
    return arrow.table([arrow.array(block.ids, arrow.string()), vectors, *columns], schema=arrow_schema)


def type_of(values: Sequence[Any]) -> str:
    """The Arrow type of a column: the common type of `values`, otherwise string."""
    types = {type(value) for value in values if value is not None}
    if types == {bool}:
        return "bool_"
    column_type = "int64" if types == {int} else "float64" if types and types <= {int, float} else "string"
    return "string" if unfit(values, column_type) else column_type


def unfit(values: Sequence[Any], column_type: str) -> dict[int, str]:
    """Values that a column of this type cannot hold: index and reason."""
    fits: dict[str, tuple[type, ...]] = {"bool_": (bool,), "int64": (int,), "float64": (int, float)}
    if column_type not in fits:
        return {}
    return {
        index: f"{json.dumps(value, ensure_ascii=False, default=str)[:60]}, where earlier rows have {column_type.rstrip('_')}"
        for index, value in enumerate(values)
        if value is not None
        and (type(value) not in fits[column_type] or (type(value) is int and value not in INTEGERS[column_type]))
    }


def _as(value: Any, text: bool) -> Any:
    """The value as the column stores it: in a string column numbers, lists and objects become JSON, dates ISO 8601."""
    if value is None or not text or isinstance(value, str):
        return value
    return strict_json.dumps(value) if isinstance(value, bool | int | float | list | dict) else str(value)
