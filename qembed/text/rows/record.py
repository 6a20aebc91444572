"""A record of a file, and what the readers of all formats have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qembed.errors import BadInput
from qembed.text.display import one_line

SHOWN_COLUMNS = 30
SHOWN_NAME = 40
HALF_PAIR = "holds half of a surrogate pair, which is no character"


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file.

    Attributes:
        number: names a record without an id: its line in plain text and JSONL, its row in CSV, TSV and Parquet, from 1.
        place: its location for messages: "FILE, line 3".
        values: by column; what could be read if the record is invalid.
        reason: why the record is invalid; None if it is valid.
        raw: its text in the file, if it is invalid and has one.
    """

    number: int
    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    raw: str | None = None


class Records(ABC):
    """The records of an open file called `name` in messages.

    Attributes:
        columns: names of the columns; None if each record has its own (JSONL).
        notes: what the reader decided, to be shown to the user.
        decimal_comma: whether numbers may be written with a comma.
        bytes_read: approximately.
    """

    columns: Sequence[str] | None = None
    by_number: bool = False
    """Whether a column can be chosen by its number."""
    decimal_comma: bool = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.notes: list[str] = []
        self.bytes_read = 0

    @abstractmethod
    def read(self, wanted: Mapping[str, str]) -> Iterator[Record]:
        """The records, with the columns `wanted` that exist; JSONL has all fields.

        `wanted` maps a column to the option that chooses it ("" if none does), for messages. CSV and TSV also take a column's
        number.

        Raises:
            BadInput: the file is damaged, or has two columns of a wanted name.
        """

    def has(self, column: str) -> bool:
        """Whether the file has the column; always true for JSONL."""
        return self.columns is None or column in self.columns or self.position(column) is not None

    def position(self, column: str) -> int | None:
        """The index of a column that is chosen by its number; None if `column` is a name or no such number."""
        if self.columns is None or not self.by_number or column in self.columns or not column.isdecimal():
            return None
        return int(column) - 1 if 0 < int(column) <= len(self.columns) else None

    def missing(self, column: str, option: str) -> BadInput:
        """The error for a column that the file lacks; `option` chooses another."""
        if not self.columns:
            return BadInput(f"{self.name}: no column {column!r}: the file is empty")
        return BadInput(f"{self.name}: no column {column!r}; choose with {option}: {shown(self.columns)}{self.advice()}")

    def advice(self) -> str:
        """What else could make the columns differ from what the user expects."""
        return ""

    def check_unique(self, wanted: Mapping[str, str]) -> None:
        """Check that no wanted column occurs twice.

        Raises:
            BadInput: one does.
        """
        for column, option in wanted.items():
            places = [str(number) for number, name in enumerate(self.columns or (), 1) if name == column]
            if len(places) > 1:
                way = f"choose one by its number with {option}" if self.by_number and option else "rename one"
                raise BadInput(f"{self.name}: {len(places)} columns are named {column!r} ({', '.join(places)}); {way}")


def shown(columns: Sequence[str]) -> str:
    """Names of columns for a message, shortened: the first line of a file without a header can hold long texts."""
    names = [one_line(name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}…") for name in columns[:SHOWN_COLUMNS]]
    more = f", and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    return (", ".join(names) or "it has none").encode("utf-8", "replace").decode() + more
