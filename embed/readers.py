"""Reads the rows of all input files in order. An invalid row is returned with a reason; it is not an error."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any

from qembed.embed import documents
from qembed.embed.inputs import STDIN, TEXT_DOCUMENTS, File, Inputs
from qembed.embed.rows import Row
from qembed.errors import BadInput
from qembed.text.rows.lines import decoded, problem
from qembed.text.rows.options import TABLES, RowOptions
from qembed.text.rows.reader import opened
from qembed.text.rows.record import Record, Records, shown
from qembed.text.rows.row_ids import IDS, RowIds
from qembed.text.rows.values import storable

FIRST_LINES = 1000
"""Lines of JSON of which one at least must have a field that the user names: not each need have it, but it may be misspelt."""


def _ignore(_: str) -> None:
    return


@dataclass
class Reading:
    """Options and progress of reading: column names (None: "text", and "id" or "_id" if there is one).

    Attributes:
        keep: columns whose values are kept.
        options: delimiter, encoding and header of the files.
        on_note: called with what a reader decided, such as a delimiter; once for each decision, whatever the number of files.
        bytes_read: bytes read so far, approximately.
        id_hashes: of the ids of all valid rows so far, in their order.
    """

    inputs: Inputs
    text_column: str | None = None
    id_column: str | None = None
    keep: Sequence[str] = ()
    options: RowOptions = field(default_factory=RowOptions)
    on_note: Callable[[str], None] = _ignore
    bytes_read: int = 0
    total: int = field(init=False)
    id_hashes: array[int] = field(init=False, default_factory=lambda: array("q"))
    _notes: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.total = sum(file.size for file in self.inputs.files)

    @cached_property
    def text(self) -> str:
        """The name of the text column."""
        return self.text_column or "text"

    @cached_property
    def columns(self) -> list[str]:
        """The columns to read and keep; `text` is always available and need not be a column."""
        return [name for name in self.keep if name != "text" or self.text == "text"]

    def rows(self) -> Iterator[Row]:
        """All rows of all files in order.

        Raises:
            BadInput: a file cannot be read, or lacks a column.
            MissingExtra: Parquet without pyarrow.
        """
        before = 0
        for file in self.inputs.files:
            for row in _document(file, self) if file.format == "document" else _records(file, self, before):
                if row.reason is None:
                    self.id_hashes.append(hash(row.id))
                yield row
            before += file.size
            self.bytes_read = before

    def repeated_ids(self) -> int:
        """The number of ids that name more than one of the rows so far."""
        import numpy as np

        _, counts = np.unique(np.asarray(self.id_hashes, np.int64), return_counts=True)
        return int((counts > 1).sum())

    @property
    def required(self) -> dict[str, str]:
        """The columns that must exist, with the options that name them."""
        named = {self.text: "--text-column", **({self.id_column: "--id-column"} if self.id_column else {})}
        return {**dict.fromkeys(self.columns, "--keep"), **named}

    def wanted(self, records: Records, file: File, ids: RowIds) -> dict[str, str]:
        """The columns to read, with the options that name them; `ids` are those of the file.

        Raises:
            BadInput: a table lacks one, or plain text is asked for columns.
        """
        if file.format == "txt":
            _check_plain(file, self)
            return {}
        for column, option in self.required.items():
            if not records.has(column):
                raise records.missing(column, option)
        return {**({ids.table_column: "--id-column"} if ids.table_column else {}), **self.required}

    def note(self, file: File, note: str) -> None:
        """Pass on what was decided about a file."""
        if note not in self._notes:
            self._notes.add(note)
            self.on_note(f"{file.name}: {note}")

    def row(self, file: File, record: Record, ids: RowIds) -> Row:
        """The row of a record; `ids` are those of its file."""
        values = record.values
        row_id = ids.of(record)
        if row_id.column != IDS[0] and self.id_column is None:
            self.note(file, f"ids are taken from {row_id.column!r}")
        reason = record.reason or row_id.reason
        name = row_id.text if row_id.own or not self.inputs.folder else f"{file.name}:{record.number}"
        columns = {column: storable(values.get(column)) for column in self.columns}
        text = values.get(self.text, record.raw)
        if reason is None and not isinstance(text, str):
            reason = f"{self.text} is {'missing' if text is None else 'not a text'}"
        if not isinstance(text, str):
            return Row(record.place, _safe(name), reason=reason, columns=columns)
        reason = reason or _problem(name, text)
        for column, value in columns.items():
            if reason is None and (unstorable := _problem(value)):
                reason = f"{column} {unstorable}"
        return Row(record.place, _safe(name), text if reason is None else _safe(text), reason, columns)


def _problem(*values: Any) -> str | None:
    """Why one of the strings in `values` cannot be stored."""
    for value in values:
        if isinstance(value, dict):
            reason = _problem(*value, *value.values())
        elif isinstance(value, list):
            reason = _problem(*value)
        else:
            reason = problem(value) if isinstance(value, str) else None
        if reason:
            return reason
    return None


def _safe(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _stream(file: File) -> IO[bytes] | None:
    return sys.stdin.buffer if file.name == STDIN else None


def _records(file: File, reading: Reading, before: int) -> Iterator[Row]:
    options = reading.options if file.format in TABLES else RowOptions(encoding=reading.options.encoding)
    with opened(file.path, file.format, options, reading.required, file.name, _stream(file)) as records:
        ids = RowIds(reading.id_column, records)
        wanted = reading.wanted(records, file, ids)
        for note in records.notes:
            reading.note(file, note)
        rows = records.read(wanted)
        for record in rows if records.columns is not None else _with_fields(rows, records, reading.required):
            reading.bytes_read = before + records.bytes_read
            yield reading.row(file, record, ids)


def _check_plain(file: File, reading: Reading) -> None:
    for option, given in (("--text-column", reading.text_column), ("--id-column", reading.id_column)):
        if given:
            raise BadInput(f"{file.name}: plain text has no columns; leave {option} out")
    if names := [name for name in reading.columns if name != "text"]:
        raise BadInput(f"{file.name}: plain text has no column {names[0]!r} to keep")


def _with_fields(rows: Iterator[Record], records: Records, required: Mapping[str, str]) -> Iterator[Record]:
    """The records of JSONL, once their fields have been checked: the text in the first object, the others in the first lines.

    Raises:
        BadInput: none of them has a field that is required.
    """
    fields: dict[str, None] = {}
    text = next(column for column, option in required.items() if option == "--text-column")
    checked = False

    def check(names: Sequence[str]) -> None:
        for column in names:
            if column not in fields:
                raise BadInput(f"{records.name}: no column {column!r}; choose with {required[column]}: {shown(list(fields))}")

    for record in rows:
        if not checked:
            if record.number >= FIRST_LINES and fields:
                check(list(required))
                checked = True
            elif record.reason is None:
                first = not fields
                fields.update(dict.fromkeys(record.values))
                if first:
                    check([text])
        yield record
    if not checked and fields:
        check(list(required))


def _document(file: File, reading: Reading) -> Iterator[Row]:
    stream = _stream(file)
    kind = file.path.suffix.lower() if stream is None else ".txt"
    columns = dict.fromkeys(reading.columns)
    largest = documents.LONGEST_TEXT if kind in TEXT_DOCUMENTS else documents.LARGEST
    try:
        if stream is None:
            with file.path.open("rb") as opened_file:
                content = opened_file.read(largest + 1)
        else:
            content = stream.read(largest + 1)
    except OSError as error:
        raise BadInput(f"{file.name}: cannot be read: {error.strerror or error}") from error
    if len(content) > largest:
        yield Row(file.name, file.name, None, f"larger than {largest >> 20} MiB", columns)
        return
    if kind not in TEXT_DOCUMENTS:
        yield Row(file.name, file.name, columns=columns, document=content, kind=kind)
        return
    text, reason, note = decoded(file.name, content, reading.options)
    if note:
        reading.note(file, note)
    if reason:
        yield Row(file.name, file.name, None, reason, columns)
    else:
        yield Row(file.name, file.name, columns=columns, document=text.encode(), kind=kind)
