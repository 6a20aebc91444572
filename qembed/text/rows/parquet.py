"""Rows of a Parquet file, in batches."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from qembed.errors import BadInput, MissingExtra
from qembed.installation import how_to_install
from qembed.text.rows.lines import NOT_UTF8, problem
from qembed.text.rows.record import Record, Records
from qembed.text.rows.values import UUID_BYTES

BATCH = 1024
LARGEST_GROUP = 2**31
"""Bytes of a row group's wanted columns, unpacked."""
SHOWN_ERROR = 200


class ParquetRecords(Records):
    """The rows of a Parquet file.

    Raises:
        BadInput: not Parquet, or damaged.
        MissingExtra: pyarrow is not installed.
    """

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise MissingExtra(f"{name}: reading Parquet needs pyarrow; install it: {how_to_install('parquet')}") from error
        self._errors = pyarrow.ArrowException
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
            # A page of a few bytes may stand for a thousand times the same long text: as a dictionary it stays one text.
            texts = [field.name for field in self._file.schema_arrow if _is_text(field.type)]
            if texts:
                self._file.close()
                self._file = pyarrow.parquet.ParquetFile(path, read_dictionary=texts)
        except OSError as error:
            if error.strerror is not None:
                raise
            raise self._damaged(error) from error  # Arrow's error for bytes that are not Parquet
        except pyarrow.ArrowException as error:
            raise self._damaged(error) from error
        self._size = path.stat().st_size
        self.columns = list(self._file.schema_arrow.names)

    def read(self, wanted: Mapping[str, str]) -> Iterator[Record]:
        """The rows with the `wanted` columns."""
        self.check_unique(wanted)
        names = [name for name in wanted if name in (self.columns or ())]
        self._check_sizes(names)
        uuids = self._uuids()
        total = max(self._file.metadata.num_rows, 1)
        number = 0
        try:
            for batch in self._file.iter_batches(batch_size=BATCH, columns=names):
                self.bytes_read = self._size * number // total
                columns = [_values(batch.column(batch.schema.names.index(name)), name in uuids) for name in names]
                for row in range(batch.num_rows):
                    number += 1
                    values = {name: column[row] for name, column in zip(names, columns, strict=True)}
                    yield _record(number, f"{self.name}, row {number}", values)
        except OSError as error:
            if error.strerror is not None:
                raise
            raise self._damaged(error) from error
        except self._errors as error:
            raise self._damaged(error) from error
        finally:
            self._file.close()

    def _check_sizes(self, names: Collection[str]) -> None:
        """Raise BadInput if a row group's columns `names` are too large for the memory once they are unpacked."""
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
            size = sum(one.total_uncompressed_size for one in columns if one.path_in_schema.partition(".")[0] in names)
            if not 0 <= size <= LARGEST_GROUP:
                raise BadInput(
                    f"{self.name}: row group {group + 1} unpacks to {size >> 20:,} MiB; at most {LARGEST_GROUP >> 20:,} MiB "
                    "are read; write the file with smaller row groups"
                )

    def _uuids(self) -> set[str]:
        """Columns of UUIDs, also those that this version of Arrow reads as plain bytes."""
        schema = self._file.schema
        columns = [schema.column(number) for number in range(len(schema.names))]
        return {column.path for column in columns if str(column.logical_type) == "UUID"}

    def _damaged(self, error: Exception) -> BadInput:
        return BadInput(f"{self.name}: not Parquet, or damaged: {' '.join(str(error).split())[:SHOWN_ERROR]}")


class _Undecodable:
    """A string that is not UTF-8, which Parquet does not check."""


UNDECODABLE = _Undecodable()


def _record(number: int, place: str, values: dict[str, Any]) -> Record:
    reason = None
    for name, value in values.items():
        if value is UNDECODABLE:
            values = {**values, name: None}
            reason = NOT_UTF8
        elif isinstance(value, str):
            reason = reason or problem(value)
    return Record(number, place, values, reason)


def _values(column: Any, is_uuid: bool = False) -> list[Any]:
    """The values of an Arrow column as Python has them; `is_uuid`: bytes are UUIDs."""
    import pyarrow as arrow

    if arrow.types.is_dictionary(column.type):
        known = _values(column.dictionary)
        return [None if at is None else known[at] for at in column.indices.to_pylist()]
    if arrow.types.is_timestamp(column.type) or arrow.types.is_duration(column.type) or arrow.types.is_time(column.type):
        column = _without_nanoseconds(column)
    try:
        values = column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        values = [_value(one) for one in column]
    if is_uuid:
        return [uuid.UUID(bytes=v) if isinstance(v, bytes) and len(v) == UUID_BYTES else v for v in values]
    return values


def _is_text(kind: Any) -> bool:
    import pyarrow as arrow

    return any(check(kind) for check in (arrow.types.is_string, arrow.types.is_binary))


def _without_nanoseconds(column: Any) -> Any:
    """Times in microseconds, which Python has types for; as text if that would lose digits."""
    import pyarrow as arrow

    kind = column.type
    if kind.unit != "ns":
        return column
    if arrow.types.is_timestamp(kind):
        target = arrow.timestamp("us", kind.tz)
    else:
        target = arrow.duration("us") if arrow.types.is_duration(kind) else arrow.time64("us")
    try:
        return column.cast(target)
    except arrow.ArrowInvalid:
        return column.cast(arrow.string())


def _value(scalar: Any) -> Any:
    """One value: `UNDECODABLE` if it is a string that is not UTF-8, text if Python has no such date."""
    import pyarrow as arrow

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return UNDECODABLE
    except (ValueError, OverflowError):
        return scalar.cast(arrow.string()).as_py()
