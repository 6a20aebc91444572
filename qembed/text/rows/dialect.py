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
    """The delimiter that the name of the format stands for."""
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
    said = SEPARATOR_LINE.fullmatch(first)
    skipped = 0
    if said:
        skipped = 1
        reason = "by its first line"
    else:
        lines = itertools.chain([first] if first else [], lines)
    if delimiter is not None:
        return Dialect(delimiter, _quoted(file_format, delimiter)), lines, skipped
    if said:
        return Dialect(said[1], _quoted(file_format, said[1]), None if said[1] == own else reason), lines, skipped
    head = _Head(lines)
    cells = {one: _cells(head, one, _quoted(file_format, one)) for one in sorted(CANDIDATES, key=lambda one: one != own)}
    if header:
        best = max(cells, key=lambda one: _rank(cells[one], wanted))
    else:
        best = (
            own
            if len(cells[own] or ()) > 1
            else next((one for one in cells if _regular(head, one, _quoted(file_format, one))), own)
        )
    reason = "by its header" if header else "by its first lines"
    return Dialect(best, _quoted(file_format, best), None if best == own else reason), head.whole(), skipped


def _quoted(file_format: str, delimiter: str) -> bool:
    return not (file_format == "tsv" and delimiter == "\t")


def _rank(cells: list[str] | None, wanted: Collection[str]) -> tuple[int, int]:
    """Greater for the likelier delimiter; Python's max() takes the first of equals."""
    return (len({cell.strip() for cell in cells} & set(wanted)), len(cells)) if cells else (0, 0)


class _Head:
    """The first lines of a file, which can be read several times."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._seen = lines, []  # type: ignore[var-annotated]

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


def _cells(head: Iterable[str], delimiter: str, quoted: bool) -> list[str] | None:
    """The first row that is not blank, with this delimiter; None if that is no row."""
    return next(_rows(head, delimiter, quoted), None)


def _regular(head: Iterable[str], delimiter: str, quoted: bool) -> bool:
    """Whether the delimiter gives the same number of columns, at least two, in each of the first rows."""
    rows = list(itertools.islice(_rows(head, delimiter, quoted), REGULAR_ROWS))
    return len(rows) > 1 and None not in rows and len({len(cells or ()) for cells in rows}) == 1 < len(rows[0] or ())


def _rows(head: Iterable[str], delimiter: str, quoted: bool) -> Iterator[list[str] | None]:
    rows = csv.reader(head, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)
    try:
        for cells in rows:
            if cells:
                yield None if quoted and any('"' in cell for cell in cells) else cells
    except csv.Error:
        yield None
