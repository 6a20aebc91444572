"""The delimiter of a CSV or TSV file, decided by its header.

`csv.Sniffer` guesses from a sample of the rows, and texts full of punctuation mislead it.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from qembed.text.rows.feed import MOST_CELLS, Feed, TooMuch

CANDIDATES = (",", ";", "\t", "|")
NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
LONGEST_CELL = 2**27
"""Characters; the csv module's own limit is 128 KiB, and a document can be longer."""
HEAD_LINES = 100
"""A quoted name in a header may hold line breaks; a header is no longer than this."""
REGULAR_ROWS = 20
PUNCTUATION = {",": r",(?= )|(?<=\d),(?=\d)", ";": "; "}
"""Commas and semicolons that are more likely part of a text or a number than between cells."""
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
    `wanted`; one that is not only punctuation (commas before spaces, decimal commas); the one that gives the most columns. If
    two are equal, it is the format's own. A quotation mark inside a cell speaks against a delimiter. Without a header it is one
    that gives equally many columns, at least two, in all of the first rows, and is not only punctuation there; the format's own
    if there is no such delimiter, or several. The `reason` then names those that would fit too.

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
        if header:
            delimiter, reason = _by_header(head, file_format, wanted), "by its header"
        else:
            delimiter, others = _by_rows(head, file_format)
            reason = "by its first lines"
            if others:
                reason += f" ({' and '.join(NAMES[other] for other in others)} would fit too: --delimiter)"
                return Dialect(delimiter, _quoted(file_format, delimiter), reason), head.whole(), skipped
        lines = head.whole()
    return Dialect(delimiter, _quoted(file_format, delimiter), None if delimiter == own else reason), lines, skipped


def _by_header(head: _Head, file_format: str, wanted: Collection[str]) -> str:
    first = next((line for line in head if line.strip()), "")

    def rank(delimiter: str) -> tuple[int, bool, int]:
        try:
            cells = next(_rows(head, delimiter, _quoted(file_format, delimiter)), None) or []
        except TooMuch:
            return 0, True, MOST_CELLS + 1
        names = len({cell.strip() for cell in cells} & set(wanted))
        return names, len(cells) > 1 and not _is_punctuation(first, delimiter), len(cells)

    return max(_candidates(file_format), key=rank)  # the first of equals


def _by_rows(head: _Head, file_format: str) -> tuple[str, list[str]]:
    """The delimiter, and others that would fit too."""

    def is_regular(delimiter: str) -> bool:
        try:
            rows = list(itertools.islice(_rows(head, delimiter, _quoted(file_format, delimiter)), REGULAR_ROWS))
        except TooMuch:
            return False
        return len(rows) > 1 and None not in rows and len({len(cells or ()) for cells in rows}) == 1 < len(rows[0] or ())

    own = own_delimiter(file_format)
    regular = list(filter(is_regular, _candidates(file_format)))
    first = "".join(itertools.islice(head, REGULAR_ROWS))
    separating = [delimiter for delimiter in regular if not _is_punctuation(first, delimiter)]
    chosen = next(iter(separating), own)
    return chosen, [delimiter for delimiter in regular if delimiter != chosen]


def _is_punctuation(text: str, delimiter: str) -> bool:
    """Whether each `delimiter` in `text` is more likely part of a text or a number than between cells."""
    pattern = PUNCTUATION.get(delimiter)
    return pattern is not None and delimiter not in re.sub(pattern, "", text)


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
    """The rows that are not blank; None for one that is no row, or has a quotation mark in a cell.

    Raises:
        TooMuch: a row is too long or has too many cells.
    """
    feed = Feed(iter(head), delimiter, quoted)
    try:
        for cells in reader(feed, delimiter, quoted):
            feed.begin()
            if cells:
                yield None if quoted and any('"' in cell for cell in cells) else cells
    except TooMuch:
        raise
    except csv.Error:
        yield None


def reader(source: Iterable[str], delimiter: str, quoted: bool) -> Iterator[list[str]]:
    """Cells of each row of `source`, lines that keep their ends; blank lines have none. `quoted`: cells may be quoted.

    Raises:
        csv.Error: while reading, a row is not CSV.
    """
    if not quoted:
        return _Unquoted(source, delimiter)
    csv.field_size_limit(LONGEST_CELL)
    return csv.reader(source, delimiter=delimiter, strict=True)


class _Unquoted:
    """The cells of each line. Unlike a generator it goes on after an error of its source, as the csv module's reader does."""

    def __init__(self, source: Iterable[str], delimiter: str) -> None:
        self._source, self._delimiter = iter(source), delimiter

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        line = next(self._source).removesuffix("\n").removesuffix("\r")
        return line.split(self._delimiter) if line else []
