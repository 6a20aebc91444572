"""A row that would take a hundred times its length in memory is one invalid row, and the rows after it are read."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qembed.errors import BadInput
from qembed.text.rows import feed, jsonl
from qembed.text.rows.options import RowOptions
from qembed.text.rows.reader import opened


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST_CELLS", 8)
    monkeypatch.setattr(jsonl, "MOST_TOKENS", 20)


def rows(path: Path, content: str) -> list[tuple[object, str | None]]:
    """The text and the reason of each record, with the number of cells that a reason names."""
    path.write_bytes(content.encode())
    with opened(path) as records:
        return [(record.values.get("text"), record.reason) for record in records.read({"text": ""})]


@pytest.mark.parametrize(
    ("name", "delimiter", "row"),
    [
        ("a.csv", ",", ",".join("123456789")),
        ("a.csv", ",", "," * 8),
        ("a.csv", ",", ",".join(['"x"'] * 9)),
        ("a.csv", ",", ",".join(['x"'] * 9)),  # inside a cell a quotation mark is one
        ("a.csv", ",", '"a\nb",,,,\n"c\nd",,,,,,,,'),
        ("a.csv", ",", '"a\nb",,,,,,,,'),
        ("a.csv", ",", '"a ""b"" \n""c",,"' + ",,,," + '",,,,,,'),
        ("a.tsv", "\t", "\t" * 8),
    ],
)
def test_a_row_of_too_many_cells(name: str, delimiter: str, row: str, tmp_path: Path) -> None:
    header, last = delimiter.join(("id", "text")), delimiter.join(("9", "last"))
    records = rows(tmp_path / name, f"{header}\n{row}\n{last}\n")
    assert records[-1] == ("last", None)
    assert [reason for _, reason in records].count(None) == 1
    assert "more than 8 cells" in str(records[-2][1])


@pytest.mark.parametrize("row", [",".join("12345678"), '"' + "," * 50 + '",' * 1 + "x", '"a,,,,\n,,,,""\n,,,,,",x'])
def test_delimiters_in_quoted_cells_are_not_counted(row: str, tmp_path: Path) -> None:
    header = ",".join(["text", *map(str, range(1, len(next(csv.reader(io.StringIO(row))))))])
    records = rows(tmp_path / "a.csv", f"{header}\n{row}\n")
    assert len(records) == 1
    assert records[0][1] is None


def test_a_header_of_too_many_cells(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="line 1: not CSV: more than 8 cells"):
        rows(tmp_path / "a.csv", "," * 8 + "\n")
    with (
        pytest.raises(BadInput, match="line 1: not CSV: more than 8 cells"),
        opened(tmp_path / "a.csv", options=RowOptions(header=False)),
    ):
        pass


def test_a_single_column_may_hold_another_delimiter_any_number_of_times(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.csv", "text\n" + "|" * 50 + "\n") == [("|" * 50, None)]
    (tmp_path / "b.csv").write_text("one" + "|" * 50 + "\ntwo\n")
    with opened(tmp_path / "b.csv", options=RowOptions(header=False)) as records:
        assert [record.values["1"] for record in records.read({"1": ""})] == ["one" + "|" * 50, "two"]


def test_cells_are_counted_as_the_csv_module_counts_them() -> None:
    draw = random.Random(7)
    compared = 0
    while compared < 2000:
        content = "".join(draw.choice('",\na ') for _ in range(draw.randrange(1, 14))) + "\n"
        source = Recorded(content)
        try:
            for cells in csv.reader(source, strict=True):
                counter = feed._Cells(",")
                for line in source.lines:
                    counter.count(line)
                source.lines.clear()
                assert not cells or counter.number == len(cells), content
                compared += bool(cells)
        except csv.Error:
            continue


class Recorded:
    """The lines of a text; `lines` are those since it was last cleared."""

    def __init__(self, content: str) -> None:
        self.lines: list[str] = []
        self._source = iter(content.splitlines(keepends=True))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.lines.append(next(self._source))
        return self.lines[-1]


@pytest.mark.parametrize(
    "value",
    ["[" + "[]," * 10 + "[]]", "[" + "0," * 20 + "0]", "[" * 30 + "]" * 30, '{"b": "\\"", "c": [' + "{}," * 10 + "{}]}"],
)
def test_a_line_of_json_with_too_many_values(value: str, tmp_path: Path) -> None:
    records = rows(tmp_path / "a.jsonl", f'{{"text": "first"}}\n{{"text": {value}}}\n{{"text": "last"}}\n')
    assert [text for text, _ in records] == ["first", None, "last"]
    assert "more than 20 values" in str(records[1][1])


def test_commas_and_brackets_in_a_json_text_are_not_counted(tmp_path: Path) -> None:
    text = ',[{\\"' * 30
    assert rows(tmp_path / "a.jsonl", f'{{"text": "{text}"}}\n') == [(',[{"' * 30, None)]
