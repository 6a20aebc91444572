"""CSV and TSV, as programs and spreadsheets write them."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any

from qembed.errors import BadInput
from qembed.text.display import counted
from qembed.text.rows import dialect, lines
from qembed.text.rows.feed import Feed, TooMuch
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
        self._feed = Feed(rest, self.dialect.delimiter, self.dialect.quoted, self._skipped)
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
                    first = "header" if self._header else "first line"
                    reason = f"{counted(len(cells), 'cell')}, the {first} has {len(columns)}"
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
        rest of the file. A row that is too much is left out whole: its lines would make thousands of rows.
        """
        if self._first:
            yield self._skipped + 1, self._first, None
        while True:
            begin = self._feed.begin()
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except TooMuch as error:
                cells, end = [self._feed.first.rstrip("\r\n")[:SHOWN]], self._feed.skip()
                yield begin, cells, f"{error} (lines {begin} to {end})" if end > begin else str(error)
                continue
            except csv.Error as error:
                line = self._feed.rewind()
                yield begin, [line.rstrip("\r\n")], f"not CSV: {error}"
                continue
            if self._feed.too_long:
                yield begin, [], f"longer than {lines.LONGEST_LINE >> 20} MiB"
            elif cells:
                yield begin, cells, None
