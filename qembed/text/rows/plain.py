"""Plain text: a text per line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO

from qembed.text.rows import lines
from qembed.text.rows.options import RowOptions
from qembed.text.rows.record import Record, Records


class LineRecords(Records):
    """Records that are a line each."""

    def __init__(self, name: str, stream: IO[bytes], options: RowOptions) -> None:
        super().__init__(name)
        self._lines = lines.Lines(name, stream, options)
        if note := self._lines.note:
            self.notes.append(note)


class PlainRecords(LineRecords):
    """One text per line, in the column "text". A blank line is a record without text, so that no line is dropped silently."""

    columns = ("text",)

    def read(self, wanted: Mapping[str, str]) -> Iterator[Record]:  # noqa: ARG002
        """The lines without their ends."""
        for number, line, reason in numbered(self._lines):
            self.bytes_read = self._lines.bytes_read
            yield Record(number, f"{self.name}, line {number}", {"text": line}, reason, line if reason else None)


def numbered(source: lines.Lines) -> Iterator[tuple[int, str, str | None]]:
    """Line numbers from 1, lines without their ends, and the reason if a line is invalid."""
    try:
        for number, line in enumerate(source, 1):
            if source.too_long:
                yield number, "", f"longer than {lines.LONGEST_LINE >> 20} MiB"
            else:
                line = line.removesuffix("\n").removesuffix("\r")
                yield number, line, source.problem(line, whole=True)
    finally:
        source.close()
