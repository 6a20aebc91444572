"""The lines of a table for the csv module, which keeps a whole row in memory: rows are bounded in length and in cells."""

from __future__ import annotations

import csv
import math
import re
from collections import deque
from collections.abc import Iterator

from qembed.text.rows import lines

MOST_CELLS = 2**18
"""Cells of a row. Each takes some 60 bytes, so a row of commas would take a hundred times its length in memory."""
QUOTED_TEXT = re.compile(r'[^"]*+(?:""[^"]*+)*+')
"""From inside a quoted cell to the quotation mark that closes it, or to the end; two marks stand for one."""


class TooMuch(csv.Error):
    """A row has more than MOST_CELLS cells, or one of several lines more than LONGEST_LINE characters; the message says so."""


class Feed:
    """Lines for the csv module that can be given again from the second line of the current row.

    `before`: lines before the first of `source`, for their numbers.

    Raises:
        TooMuch: instead of a line with which the row would be too long or have too many cells.
    """

    def __init__(self, source: Iterator[str], delimiter: str, quoted: bool, before: int = 0) -> None:
        self._source, self._delimiter, self._quoted = source, delimiter, quoted
        self._again: deque[str] = deque()
        self._row: list[str] = []
        self._number = before
        self._characters = self._delimiters = 0
        self._cells: _Cells | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._next()
        self._row.append(line)
        self._characters += len(line)
        if len(self._row) > 1 and self._characters > lines.LONGEST_LINE:
            raise TooMuch(f"longer than {lines.LONGEST_LINE >> 20} MiB")
        self._delimiters += line.count(self._delimiter)
        if self._delimiters >= MOST_CELLS:
            self._count_cells(line)
        return line

    def _count_cells(self, line: str) -> None:
        """Count the delimiters of the current row that are in no quoted cell, as the row has many."""
        if not self._quoted:
            raise TooMuch(f"more than {MOST_CELLS:,} cells")
        if self._cells is None:
            self._cells = _Cells(self._delimiter, MOST_CELLS)
            for earlier in self._row[:-1]:
                self._cells.count(earlier)
        self._cells.count(line)
        if self._cells.number > MOST_CELLS:
            raise TooMuch(f"more than {MOST_CELLS:,} cells")

    def _next(self) -> str:
        line = self._again.popleft() if self._again else next(self._source)
        self._number += 1
        return line

    @property
    def first(self) -> str:
        """The first line of the current row."""
        return self._row[0]

    def skip(self) -> int:
        """Read the current row to its end, outside quoted cells, without keeping it; returns the number of its last line."""
        row = _Cells(self._delimiter)
        for line in self._row if self._quoted else ():
            row.count(line)
        self._row.clear()
        while row.is_open:
            try:
                row.count(self._next())
            except StopIteration:
                break
        return self._number

    @property
    def too_long(self) -> bool:
        """Whether the current row has a line that was shortened."""
        return any(len(line) >= lines.LONGEST_LINE for line in self._row)

    def begin(self) -> int:
        """Begin a row; returns the number of its first line."""
        self._row.clear()
        self._characters = self._delimiters = 0
        self._cells = None
        return self._number + 1

    def rewind(self) -> str:
        """Give all lines of the current row again except its first, which is returned."""
        first, *rest = self._row
        self._again.extendleft(reversed(rest))
        self._number -= len(rest)
        self._row.clear()
        return first


class _Cells:
    """Counts the cells of a row, line by line, as the csv module would: a cell is quoted if it begins with a quotation mark.

    Attributes:
        number: of cells so far; counting stops above `most`.
        is_open: whether the row goes on, inside a quoted cell.
    """

    def __init__(self, delimiter: str, most: float = math.inf) -> None:
        self._delimiter, self._most = delimiter, most
        self.number, self.is_open = 1, False

    def count(self, line: str) -> None:
        """Count on; `line` is the next of the row."""
        at, begins_quoted = 0, not self.is_open and line.startswith('"')
        while self.number <= self._most:
            if self.is_open or begins_quoted:
                match = QUOTED_TEXT.match(line, at if self.is_open else at + 1)
                assert match is not None
                self.is_open = match.end() == len(line)
                at = match.end() + 1
            if self.is_open:
                return
            quoted = line.find(self._delimiter + '"', at)
            begins_quoted = quoted >= 0
            self.number += line.count(self._delimiter, at, quoted + 1 if begins_quoted else len(line))
            if not begins_quoted:
                return
            at = quoted + 1
