"""The delimiter of a CSV or TSV file, decided by its header.

`csv.Sniffer` guesses from a sample of the rows, and texts full of punctuation mislead it.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

CANDIDATES = (",", ";", "\t", "|")
NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
LONGEST_CELL = 2**27
"""Characters; the csv module's own limit is 128 KiB, and a document can be longer."""
HEAD_LINES = 100
"""A quoted name in a header may hold line breaks; a header is no longer than this."""
REGULAR_ROWS = 20
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)
"""The first line by which Excel learns the delimiter; it is no row."""


@dataclass(frozen=True)
class Dialect:
    """The delimiter, and whether cells may be quoted; `reason`: what decided, if it was not the file's name."""

    delimiter: str
    quoted: bool
    reason: str | None = None

    @property
    def title(self) -> str:
        """The delimiter in words."""
        return NAMES.get(self.delimiter, repr(self.delimiter))


def own_delimiter(file_format: str) -> str:
    """The usual delimiter of the format."""
    return "\t" if file_format == "tsv" else ","


def decide(
    lines: Iterator[str],
    file_format: str,
    delimiter: str | None,
    header: bool,
    wanted: Collection[str],
) -> tuple[Dialect, Iterator[str], int]:
    """The dialect, the lines from the header on, and the number of lines before it.

    The delimiter is, in this order: `delimiter`; what a first line `sep=` says; the one that gives a column with a name in
    `wanted`; the one that gives the most columns. If two are equal, it is the format's own. A quotation mark inside a cell
    speaks against a delimiter. Without a header the format's own delimiter stays, unless it gives one column and another gives
    equally many, at least two, in all of the first rows.

    TSV knows no quotes (IANA text/tab-separated-values); every other table may have quoted cells (RFC 4180).
    """
    own = own_delimiter(file_format)
    first = next(lines, "")
    separator = SEPARATOR_LINE.fullmatch(first)
    if separator is None and first:
        lines = itertools.chain([first], lines)
    skipped = 0 if separator is None else 1
    reason = None
    if delimiter is None and separator:
        delimiter, reason = separator[1], "by its first line"
    elif delimiter is None:
        head = _Head(lines)
        delimiter = _by_header(head, file_format, wanted) if header else _by_rows(head, file_format)
        lines, reason = head.whole(), "by its header" if header else "by its first lines"
    return Dialect(delimiter, _quoted(file_format, delimiter), None if delimiter == own else reason), lines, skipped


def _by_header(head: _Head, file_format: str, wanted: Collection[str]) -> str:
    def rank(delimiter: str) -> tuple[int, int]:
        cells = next(_rows(head, delimiter, _quoted(file_format, delimiter)), None) or []
        return len({cell.strip() for cell in cells} & set(wanted)), len(cells)

    return max(_candidates(file_format), key=rank)  # the first of equals


def _by_rows(head: _Head, file_format: str) -> str:
    def is_regular(delimiter: str) -> bool:
        rows = list(itertools.islice(_rows(head, delimiter, _quoted(file_format, delimiter)), REGULAR_ROWS))
        return len(rows) > 1 and None not in rows and len({len(cells or ()) for cells in rows}) == 1 < len(rows[0] or ())

    own, *others = _candidates(file_format)
    first = next(_rows(head, own, _quoted(file_format, own)), None)
    return own if len(first or ()) > 1 else next(filter(is_regular, others), own)


def _candidates(file_format: str) -> list[str]:
    """The delimiters, the format's own first."""
    own = own_delimiter(file_format)
    return [own, *(delimiter for delimiter in CANDIDATES if delimiter != own)]


def _quoted(file_format: str, delimiter: str) -> bool:
    return not (file_format == "tsv" and delimiter == "\t")


class _Head:
    """The first lines of a file, which can be read several times."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._seen: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for number in range(HEAD_LINES):
            if number == len(self._seen):
                line = next(self._lines, None)
                if line is None:
                    return
                self._seen.append(line)
            yield self._seen[number]

    def whole(self) -> Iterator[str]:
        return itertools.chain(self._seen, self._lines)


def _rows(head: Iterable[str], delimiter: str, quoted: bool) -> Iterator[list[str] | None]:
    """The rows that are not blank; None for one that is no row, or has a quotation mark in a cell."""
    try:
        for cells in filter(None, reader(head, delimiter, quoted)):
            yield None if quoted and any('"' in cell for cell in cells) else cells
    except csv.Error:
        yield None


def reader(source: Iterable[str], delimiter: str, quoted: bool) -> Iterator[list[str]]:
    """Cells of each row of `source`, lines that keep their ends; blank lines have none. `quoted`: cells may be quoted.

    Raises:
        csv.Error: while reading, a row is not CSV.
    """
    if not quoted:
        return (line.split(delimiter) if line else [] for line in _without_ends(source))
    csv.field_size_limit(LONGEST_CELL)
    return csv.reader(source, delimiter=delimiter, strict=True)


def _without_ends(source: Iterable[str]) -> Iterator[str]:
    for line in source:
        yield line.removesuffix("\n").removesuffix("\r")
