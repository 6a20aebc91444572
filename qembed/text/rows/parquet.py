"""Rows of a Parquet file, in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qembed.errors import BadInput
from qembed.parquet.file import TOO_LARGE, ParquetFile
from qembed.text.rows.arrow import UNDECODABLE, python_values
from qembed.text.rows.lines import NOT_UTF8, problem
from qembed.text.rows.record import Record, Records

BATCH = 1024
LARGEST_GROUP = 2**31
"""Bytes of a row group's wanted columns, unpacked."""


class ParquetRecords(Records):
    """The rows of an open Parquet file."""

    def __init__(self, file: ParquetFile, size: int) -> None:
        super().__init__(file.name)
        self._file, self._size = file, size
        self.columns = list(file.schema.names)

    def read(self, wanted: Mapping[str, str]) -> Iterator[Record]:
        """The rows with the `wanted` columns."""
        self.check_unique(wanted)
        names = [name for name in wanted if name in (self.columns or ())]
        self._check_sizes(names)
        total = max(self._file.rows, 1)
        number = 0
        for batch in self._file.batches(BATCH, names):
            self.bytes_read = self._size * number // total
            if batch is None:
                number += 1
                yield Record(number, f"{self.name}, row {number}", {}, TOO_LARGE)
                continue
            columns = [python_values(batch.column(batch.schema.names.index(name)), name in self._file.uuids) for name in names]
            for row in range(batch.num_rows):
                number += 1
                values = {name: column[row] for name, column in zip(names, columns, strict=True)}
                yield _record(number, f"{self.name}, row {number}", values)

    def _check_sizes(self, names: Collection[str]) -> None:
        """Raise BadInput if a row group's columns `names` are too large for the memory once they are unpacked."""
        for number, group in enumerate(self._file.groups, 1):
            size = sum(group.sizes.get(name, 0) for name in names)
            if not 0 <= size <= LARGEST_GROUP:
                raise BadInput(
                    f"{self.name}: row group {number} unpacks to {size >> 20:,} MiB; at most {LARGEST_GROUP >> 20:,} MiB "
                    "are read; write the file with smaller row groups"
                )


def _record(number: int, place: str, values: dict[str, Any]) -> Record:
    reason = None
    for name, value in values.items():
        if value is UNDECODABLE:
            values = {**values, name: None}
            reason = NOT_UTF8
        elif isinstance(value, str):
            reason = reason or problem(value)
    return Record(number, place, values, reason)
