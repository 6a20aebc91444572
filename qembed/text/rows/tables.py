"""CSV and TSV, as programs and spreadsheets write them."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any

from qembed.errors import BadInput
from qembed.text.rows import dialect, lines
from qembed.text.rows.options import RowOptions
from qembed.text.rows.record import Record, Records

SHOWN = 200
"""Characters of a row that is too long, by which it can be found."""


class TableRecords(Records):
    """The rows of a table whose first line names the columns; without a header they are numbered from 1.

    `wanted`: columns of which the file is expected to have some; they help to decide the delimiter. Blank lines are skipped.
    """

    by_number = True

    def __init__(
        self,
        name: str,
        stream: IO[bytes],
        file_format: str,
        options: RowOptions,
        wanted: Collection[str],
    ) -> None:
        super().__init__(name)
        self._header, self._adjustable = options.header, options.adjustable
        self._lines = lines.Lines(name, stream, options, universal=file_format == "csv")
        self.dialect, rest, self._skipped = dialect.decide(
            iter(self._lines), file_format, options.delimiter, options.header, wanted
        )
        self.decimal_comma = self.dialect.delimiter != ","
        self._feed = _Feed(rest, self._skipped)
        self._reader = dialect.reader(self._feed, self.dialect.delimiter, self.dialect.quoted)
        try:
            first = next(filter(None, self._reader), [])
        except csv.Error as error:
            raise BadInput(f"{name}, line {self._skipped + 1}: not CSV: {error}") from error
        for cell in first:
            if options.header and (problem := self._lines.problem(cell)):
                raise BadInput(f"{name}, line {self._skipped + 1}: {problem}")
        self._first = None if options.header else first
        self.columns = [cell.strip() for cell in first] if options.header else [str(n + 1) for n in range(len(first))]
        if self.dialect.reason:
            self.notes.append(f"read with the delimiter {self.dialect.title}, {self.dialect.reason}")
        if note := self._lines.note:
            self.notes.append(note)

    def advice(self) -> str:
        """How to overrule what the reader took for the header and the delimiter."""
        if not self._adjustable:
            return ""
        no_header = "; if the first line is no header, add --no-header" if self._header else ""
        return f" (the delimiter is {self.dialect.title}; --delimiter names another{no_header})"

    def read(self, wanted: Mapping[str, str]) -> Iterator[Record]:
        """The rows with the `wanted` columns."""
        self.check_unique(wanted)
        columns = list(self.columns or ())
        numbered = {name: self.position(name) for name in wanted if name not in columns}
        places = {name: columns.index(name) for name in wanted if name in columns}
        places |= {name: position for name, position in numbered.items() if position is not None}
        number = 0
        try:
            for begin, cells, reason in self._rows():
                number += 1
                self.bytes_read = self._lines.bytes_read
                place = f"{self.name}, line {begin}"
                if reason is None and len(cells) != len(columns):
                    reason = f"{len(cells)} cells, the {'header' if self._header else 'first line'} has {len(columns)}"
                if reason is not None:
                    yield Record(number, place, {}, reason, self.dialect.delimiter.join(cells) or None)
                    continue
                values: dict[str, Any] = {name: cells[at] for name, at in places.items()}
                yield Record(number, place, values, next(filter(None, map(self._lines.problem, values.values())), None))
        finally:
            self._lines.close()

    def _rows(self) -> Iterator[tuple[int, list[str], str | None]]:
        """Number of the first line, cells, and the reason if a row is invalid.

        Of an invalid row of several lines only the first is left out: a quotation mark that is never closed would swallow the
        rest of the file. A row that is too long is left out whole: its lines would make thousands of rows.
        """
        if self._first:
            yield self._skipped + 1, self._first, None
        while True:
            begin = self._feed.begin()
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except _TooLong:
                cells, end = [self._feed.first.rstrip("\r\n")[:SHOWN]], self._feed.skip()
                yield begin, cells, f"longer than {lines.LONGEST_LINE >> 20} MiB (lines {begin} to {end})"
                continue
            except csv.Error as error:
                line = self._feed.rewind()
                yield begin, [line.rstrip("\r\n")], f"not CSV: {error}"
                continue
            if self._feed.too_long:
                yield begin, [], f"longer than {lines.LONGEST_LINE >> 20} MiB"
            elif cells:
                yield begin, cells, None


class _TooLong(csv.Error):
    """A row of several lines has more than LONGEST_LINE characters."""


class _Feed:
    """Lines for the csv module that can be given again from the second line of the current row.

    Raises:
        _TooLong: instead of a line with which the row would be too long.
    """

    def __init__(self, source: Iterator[str], before: int) -> None:
        self._source = source
        self._again: deque[str] = deque()
        self._row: list[str] = []
        self._number = before
        self._characters = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._next()
        self._row.append(line)
        self._characters += len(line)
        if len(self._row) > 1 and self._characters > lines.LONGEST_LINE:
            raise _TooLong
        return line

    def _next(self) -> str:
        line = self._again.popleft() if self._again else next(self._source)
        self._number += 1
        return line

    @property
    def first(self) -> str:
        """The first line of the current row."""
        return self._row[0]

    def skip(self) -> int:
        """Read the current row to its end, outside quotation marks, without keeping it; returns the number of its last line."""
        is_open = sum(line.count('"') for line in self._row) % 2 == 1
        self._row.clear()
        while is_open:
            try:
                is_open ^= self._next().count('"') % 2 == 1
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
        self._characters = 0
        return self._number + 1

    def rewind(self) -> str:
        """Give all lines of the current row again except its first, which is returned."""
        first, *rest = self._row
        self._again.extendleft(reversed(rest))
        self._number -= len(rest)
        self._row.clear()
        return first
