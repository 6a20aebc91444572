"""Rows of CSV and TSV, read alike by every command."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _csv import Reader

LONGEST_CELL = 2**27
"""Characters; the csv module's own limit is 128 KiB, and a document can be longer."""


def reader(lines: Iterable[str], suffix: str) -> Reader:
    """Cells of each row of `lines`, which keep their ends. `suffix` is ".csv" or ".tsv".

    CSV cells may be quoted (RFC 4180). TSV knows no quotes (IANA text/tab-separated-values): a quotation mark is a character
    like any other, and a cell holds no line break.

    Raises:
        csv.Error: while reading, a row is not CSV.
    """
    csv.field_size_limit(LONGEST_CELL)
    if suffix == ".tsv":
        return csv.reader(_without_ends(lines), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    return csv.reader(lines, strict=True)


def _without_ends(lines: Iterable[str]) -> Iterator[str]:
    """Lines without their ends: the csv module would take a carriage return inside a line for one."""
    for line in lines:
        yield line.removesuffix("\n").removesuffix("\r")
