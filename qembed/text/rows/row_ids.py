"""The ids of rows, and names for those that have none."""

from __future__ import annotations

from dataclasses import dataclass

from qembed.text.rows.record import Record, Records
from qembed.text.rows.values import NoId, id_text

IDS = ("id", "_id")
"""Columns that are taken for the id unless the user names one; the second is that of BEIR's sets."""


@dataclass(frozen=True)
class RowId:
    """The id of a row, from `column`; `own`: it is no name for want of one. `reason`: why the row can't have that id."""

    text: str
    column: str
    own: bool
    reason: str | None


class RowIds:
    """The ids of the rows of one file, which are given in their order.

    A row without an id is named by its number: "7". In a file with ids it is "row 7", as a number may be another row's id.
    A table with a column of ids has ids; other files have them from the first row with one. `column`: the user's choice of a
    column, of which each row needs a value.

    Attributes:
        table_column: the column of ids, if the file is a table that has one.
    """

    def __init__(self, column: str | None, records: Records) -> None:
        self._choice = column
        columns = records.columns or ()
        self.table_column = column if records.columns is not None else None
        if column is None:
            self.table_column = next((name for name in IDS if name in columns), None)
        self._has_ids = self.table_column is not None
        self._last_number = 0

    def of(self, record: Record) -> RowId:
        """The id of the next row."""
        values, reason = record.values, None
        column = self._choice or self.table_column or next((name for name in IDS if name in values), IDS[0])
        try:
            own = id_text(values.get(column))
            if own is not None and _number(own) in range(1, self._last_number + 1):
                raise NoId(f"{own}, by which an earlier row without an id is named")
        except NoId as error:
            own, reason = None, f"{column} is no id: {error}"
        if own is not None:
            self._has_ids = True
            return RowId(own, column, True, None)
        if self._choice and values:
            reason = reason or f"{column} is missing"
        if self._has_ids:
            return RowId(f"row {record.number}", column, False, reason)
        self._last_number = record.number
        return RowId(str(record.number), column, False, reason)


def _number(text: str) -> int | None:
    """The number of which `text` is the usual form."""
    return int(text) if text.isascii() and text.isdigit() and text[0] != "0" and len(text) < 20 else None
