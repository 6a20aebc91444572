"""Ids of rows in files where some rows have none: `qembed embed` and `qembed eval` name them alike, and no two alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qembed.embed.inputs import find
from qembed.embed.readers import Reading
from qembed.eval import texts


def write(path: Path, ids: list[Any]) -> Path:
    """A file of rows "text 1", "text 2" and so on with these ids; None: the row has none."""
    rows = [{"text": f"text {number}", **({} if own is None else {"id": own})} for number, own in enumerate(ids, 1)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("text,id\n" + "".join(f"{row['text']},{row.get('id', '')}\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows], "id": ids}), path)
    return path


def names(path: Path) -> list[str]:
    """The ids of the rows that both commands accept."""
    embedded = [row.id for row in Reading(find(str(path), None, "lines")).rows() if row.reason is None]
    assert [text.id for text in texts.read(path, leave_out=True).texts] == embedded
    return embedded


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("ids", [[2, None, 3], [None, 1, None], [None, 3, None]])
def test_a_row_without_id_is_not_named_as_another_row(tmp_path: Path, suffix: str, ids: list[int | None]) -> None:
    expected = [f"row {number}" if own is None else str(own) for number, own in enumerate(ids, 1)]
    assert names(write(tmp_path / f"t{suffix}", ids)) == expected


def test_a_json_file_has_ids_from_the_first_row_with_one(tmp_path: Path) -> None:
    assert names(write(tmp_path / "t.jsonl", ["3", None, None])) == ["3", "row 2", "row 3"]
    assert names(write(tmp_path / "t.jsonl", [None, None, "3", "03", 7, None])) == ["1", "2", "3", "03", "7", "row 6"]


def test_an_id_that_already_names_a_row_without_one_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [None, None, 1, "2", 0])
    rows = list(Reading(find(str(path), None, "lines")).rows())
    assert [row.id for row in rows if row.reason is None] == ["1", "2", "0"]
    assert [row.reason for row in rows if row.reason] == [
        f"id is no id: {number}, by which an earlier row without an id is named" for number in (1, 2)
    ]
    assert names(path) == ["1", "2", "0"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_rows_of_files_without_ids_are_named_by_their_numbers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        path.write_text("text\na\nb\n")
    elif suffix == ".jsonl":
        path.write_text('{"text": "a"}\n{"text": "b"}\n')
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    assert names(path) == ["1", "2"]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("0.5", "0.5"),
        ("12345678.125000", "12345678.125"),
        ("0.1234567890123456789", None),
        ("1.00000000000000000001", None),
        ("0.10000000000000000001", None),
        ("123456789012345678e-3", None),
        ("9007199254740993.0", None),
        ("1e-99999999999999999999", None),
    ],
)
def test_json_numbers_that_lose_digits_as_floats_are_no_ids(tmp_path: Path, written: str, name: str | None) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"id": {written}, "text": "a", "weights": [0.12345678901234567890]}}\n')
    (row,) = Reading(find(str(path), None, "lines"), keep=["weights"]).rows()
    assert row.columns == {"weights": [0.12345678901234568]}
    assert (row.id if row.reason is None else None) == name
    assert (row.reason is None) == (name is not None)
