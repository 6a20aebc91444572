"""What all readers share: JSON lines, and tables with a header (CSV, TSV, JSONL)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qembed.errors import BadInput
from qembed.eval.texts import lines
from qembed.text import tables

KINDS = (".csv", ".tsv", ".jsonl")
"""Bytes; Python's csv refuses more than 128 KiB unless told otherwise, and a text may be a book."""


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Location ("FILE, line 3") and JSON object of each line that is not blank.

    Raises:
        BadInput: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in lines(path):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BadInput(f"{where}: not a JSON object")
        yield where, value


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Location and cells by column of each row of a `.csv` or `.tsv` with a header, or of a `.jsonl`.

    Raises:
        BadInput: unsupported suffix, unreadable file, or a row with more or fewer cells than the header.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise BadInput(f"{path}: name it {', '.join(KINDS[:-1])} (with a header) or {KINDS[-1]} (one JSON object a line)")
    if kind == ".jsonl":
        yield from objects(path)
        return
    for _ in lines(path):  # for its messages: bytes that are not UTF-8, with their line
        pass
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            reader = tables.reader(file, kind)
            header = [name.strip() for name in next(reader, [])]
            for cells in reader:
                if not cells:
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(header):
                    raise BadInput(f"{where}: {len(cells)} cells, the header has {len(header)}")
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: {error}") from error


def column(row: dict[str, Any], names: Sequence[str], where: str, what: str) -> str:
    """The first of the columns `names` that `row` has.

    Raises:
        BadInput: it has none of them.
    """
    found = next((name for name in names if name in row), None)
    if found is None:
        shown = f"{where}: no column for the {what} ({' or '.join(names)}); there are: {', '.join(row) or 'none'}"
        separated = len(row) == 1 and any(sign in next(iter(row)) for sign in ";\t|")
        raise BadInput(f"{shown}; {'separate the cells with commas' if separated else 'name yours as FILE:COLUMN,COLUMN'}")
    return found


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
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: {what} holds half of a surrogate pair, which is not text") from error
    return value


def language(row: dict[str, Any]) -> str | None:
    """The language of a row, from the column `language` or `lang`."""
    value = row.get("language") or row.get("lang")
    return value if isinstance(value, str) else None
