"""What all readers share: the rows of tables and of JSON lines, and the texts in them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qembed.errors import BadInput
from qembed.text.rows.lines import problem
from qembed.text.rows.options import RowOptions
from qembed.text.rows.reader import DEFAULT, FIXED, FORMATS, opened
from qembed.text.rows.record import Record, shown
from qembed.text.rows.values import NoId, id_text

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
LANGUAGE = ("language", "lang")
UNNAMED = (*LANGUAGE, "split")
"""Columns that no argument names."""
NAMING = "FILE:COLUMN,COLUMN"
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(e[+-]?\d+)?", re.IGNORECASE)


def objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Location ("FILE, line 3") and JSON object of each line that is not blank.

    Raises:
        BadInput: the file cannot be read, or a line is not a JSON object.
    """
    with opened(path, "jsonl", FIXED) as records:
        for record in records.read({}):
            yield record.place, _valid(record)


@dataclass(frozen=True)
class TableRow:
    """A row: its location for messages, the values of the wanted columns, and the names of all columns.

    `advice` suggests what to try if a column is missing; `decimal_comma`: whether numbers may be written with a comma.
    """

    where: str
    values: Mapping[str, Any]
    columns: Sequence[str]
    advice: str = ""
    decimal_comma: bool = False


def rows(
    path: Path, wanted: Sequence[str], options: RowOptions = DEFAULT, on_note: Callable[[str], None] = lambda _: None
) -> Iterator[TableRow]:
    """The rows of a table (CSV, TSV, Parquet) or of a `.jsonl`, with the columns `wanted` that exist.

    `on_note` is called with what the reader decided, such as a delimiter.

    Raises:
        BadInput: unsupported suffix, unreadable file, or an invalid row.
        MissingExtra: Parquet without pyarrow.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None or kind == "txt":
        raise BadInput(
            f"{path}: name it {', '.join(KINDS[:2])} (with a header), {KINDS[3]} or {KINDS[2]} (a JSON object a line)"
        )
    with opened(path, kind, options, wanted) as records:
        for note in records.notes:
            on_note(f"{path}: {note}")
        for record in records.read({name: "" if name in UNNAMED else NAMING for name in wanted}):
            values = _valid(record)
            columns = list(values) if records.columns is None else records.columns
            yield TableRow(record.place, values, columns, records.advice(), records.decimal_comma)


def _valid(record: Record) -> Mapping[str, Any]:
    if record.reason:
        raise BadInput(f"{record.place}: {record.reason}")
    return record.values


def column(row: TableRow, names: Sequence[str], what: str) -> Any:
    """The value of the first of the columns `names` that `row` has.

    Raises:
        BadInput: it has none of them.
    """
    name = next((name for name in names if name in row.values), None)
    if name is None:
        raise BadInput(
            f"{row.where}: no column for the {what} ({' or '.join(names)}); there are: {shown(row.columns)}; "
            f"name yours as {NAMING}{row.advice}"
        )
    return row.values[name]


def text(value: Any, where: str, what: str) -> str:
    """The text of a cell.

    Raises:
        BadInput: it is not a string, or empty.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadInput(f"{where}: {what} is {'missing' if value is None else 'not a text'}")
    if not value.strip():
        raise BadInput(f"{where}: {what} is empty")
    if reason := problem(value):
        raise BadInput(f"{where}: {what} {reason}")
    return value


def label(value: Any, where: str, what: str) -> str:
    """The text of a label without white space around it. It may be a number: pandas makes floats of integers with gaps.

    Raises:
        BadInput: it is empty, or neither text nor number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return text(value, where, what).strip()
    try:
        return text(id_text(value), where, what)
    except NoId as error:
        raise BadInput(f"{where}: {what} is {error}") from error


def number(value: Any, row: TableRow) -> float:
    """The number in a cell; NaN if it is none. Where commas do not separate cells, a decimal comma is understood."""
    if row.decimal_comma and isinstance(value, str) and DECIMAL_COMMA.fullmatch(value.strip()):
        value = value.replace(",", ".")
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # which Python takes for numbers
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def language(values: Mapping[str, Any]) -> str | None:
    """The language of a row, from the column `language` or `lang`."""
    value = values.get("language") or values.get("lang")
    return value if isinstance(value, str) else None
