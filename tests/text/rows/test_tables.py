"""CSV and TSV in every command, with any delimiter and encoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qembed.embed.inputs import find
from qembed.embed.readers import Reading
from qembed.errors import BadInput
from qembed.eval import texts
from qembed.eval.readers import files
from qembed.quantize import calibration_texts
from qembed.text.rows import lines
from qembed.text.rows.options import RowOptions
from qembed.text.rows.reader import opened

DIALOG = Path(__file__).parents[2] / "cases" / "02-tsv-quotes" / "dialog.tsv"
TEXTS = ['"I came home late.', 'Nobody was awake."', "The lamp was still on."]
Read = Callable[[Path, RowOptions, str], list[str]]


def by_embed(path: Path, options: RowOptions, column: str) -> list[str]:
    rows = list(Reading(find(str(path), None, "lines"), column, options=options).rows())
    assert not [row for row in rows if row.reason]
    return [row.text or "" for row in rows]


def by_eval(path: Path, options: RowOptions, column: str) -> list[str]:
    return [text.text for text in texts.read(path, options, column).texts]


def by_tasks(path: Path, options: RowOptions, column: str) -> list[str]:
    return [row.values[column] for row in files.rows(path, [column], options)]


def by_quantize(path: Path, options: RowOptions, column: str) -> list[str]:
    return [text.text for text in calibration_texts._rows(path, column, options)]


ALL = [by_embed, by_eval, by_tasks, by_quantize]
MINE = ["Bücher; viele", "größer, 3,5 €"]
CONTENTS = {
    "comma": 'id,text\n1,Bücher; viele\n2,"größer, 3,5 €"\n',
    "semicolon": 'id;text\n1;"Bücher; viele"\n2;größer, 3,5 €\n',
    "tab": "id\ttext\n1\tBücher; viele\n2\tgrößer, 3,5 €\n",
    "pipe": "id|text\n1|Bücher; viele\n2|größer, 3,5 €\n",
    "sep": 'sep=;\r\nid;text\r\n1;"Bücher; viele"\r\n2;größer, 3,5 €\r\n',
    "quoted": '"id";"text"\n"1";"Bücher; viele"\n"2";"größer, 3,5 €"\n',
    "blank lines": 'id,text\n\n1,Bücher; viele\n\n2,"größer, 3,5 €"\n\n',
    "carriage returns": 'id;text\r1;"Bücher; viele"\r2;größer, 3,5 €\r',
    "several lines in a name": 'id;"the\nlong name, of it"; text\n1;x;"Bücher; viele"\n2;y;größer, 3,5 €\n',
    "empty names": 'id;text;;\n1;"Bücher; viele";;\n2;größer, 3,5 €;;\n',
    "commas in names": 'first, second, third;text\nx;"Bücher; viele"\ny;größer, 3,5 €\n',
}


@pytest.mark.parametrize("read", ALL)
def test_tsv_quotes_are_literal(read: Read) -> None:
    assert read(DIALOG, RowOptions(), "text") == TEXTS


@pytest.mark.parametrize("read", ALL)
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_the_header_decides_the_delimiter(content: str, read: Read, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode("utf-8-sig"))
    assert read(path, RowOptions(), "text") == MINE


@pytest.mark.parametrize("read", ALL)
@pytest.mark.parametrize(
    ("encoding", "option"), [("cp1252", "cp1252"), ("utf-16", None), ("utf-16-le", "utf-16-le"), ("utf-32", None)]
)
def test_encodings(encoding: str, option: str | None, read: Read, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(CONTENTS["semicolon"].encode(encoding))
    assert read(path, RowOptions(encoding=option), "text") == MINE


@pytest.mark.parametrize("read", ALL)
@pytest.mark.parametrize("options", [RowOptions(header=False), RowOptions(";", None, False)])
def test_without_a_header_columns_have_numbers(options: RowOptions, read: Read, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(CONTENTS["semicolon"].split("\n", 1)[1], encoding="utf-8")
    assert read(path, options, "2") == MINE


HEADERLESS = {
    "commas in some texts": "One, two;3\nFour;5\nSix, seven, eight;9\n",
    "a comma in each text": "One, two;3\nFour, five;6\n",
    "decimal commas": "One;2,5\nTwo;3,75\n",
    "a tab": "One, two\t3\nFour\t5\n",
    "a comma in the first": "One, two|3\nFour|5\n",
}


@pytest.mark.parametrize("read", ALL)
@pytest.mark.parametrize("content", HEADERLESS.values(), ids=HEADERLESS)
def test_punctuation_in_the_first_lines_is_no_delimiter(content: str, read: Read, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    delimiter = next(sign for sign in ";\t|" if sign in content)
    expected = [line.split(delimiter)[0] for line in content.splitlines()]
    assert read(path, RowOptions(header=False), "1") == expected


def test_another_delimiter_that_would_fit_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    headerless = RowOptions(header=False)
    assert records(path, b"a;b,1\nc;d,2\n", headerless, ("1",))[0] == [
        "read with the delimiter comma, by its first lines (semicolon would fit too: --delimiter)"
    ]
    assert records(path, b"a,b\nc,d\n", headerless, ("1",))[0] == []


def test_commas_within_the_names_of_columns_are_no_delimiters(tmp_path: Path) -> None:
    _, rows = records(tmp_path / "a.csv", b"Question, short;Answer, long\na, b;c\n", columns=("1",))
    assert [row.values for row in rows] == [{"1": "a, b"}]
    _, rows = records(tmp_path / "a.csv", b"id, body, label\na, b;c, d\n", columns=("2",))
    assert [row.values for row in rows] == [{"2": " b;c"}]


@pytest.mark.parametrize("read", ALL)
def test_a_single_column_of_sentences_is_not_split(read: Read, tmp_path: Path) -> None:
    sentences = ["One; two, three.", "Four; five, six.", "Seven."]
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(["text", *sentences]))
    assert read(path, RowOptions(), "text") == sentences
    path.write_text("\n".join(sentences))
    assert read(path, RowOptions(header=False), "1") == sentences


@pytest.mark.parametrize("read", ALL)
def test_duplicate_columns_are_refused_only_if_used(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,body,text,x,x\na,b,c,d,e\n")
    with pytest.raises(BadInput, match=r"2 columns are named 'text' \(1, 3\); choose one by its number"):
        read(path, RowOptions(), "text")
    assert read(path, RowOptions(), "3") == ["c"]
    assert read(path, RowOptions(), "body") == ["b"]


@pytest.mark.parametrize("read", ALL)
def test_a_cell_may_be_longer_than_the_limit_of_the_csv_module(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"id,text\n1,{'x' * 200_000}\n")
    assert read(path, RowOptions(), "text") == ["x" * 200_000]
    path.write_text(f"1;{'x' * 200_000}\n2;short\n")
    assert read(path, RowOptions(header=False), "2") == ["x" * 200_000, "short"]


def records(path: Path, content: bytes, options: RowOptions | None = None, columns: tuple[str, ...] = ("text",)) -> Any:
    path.write_bytes(content)
    with opened(path, None, options or RowOptions(), columns, "F") as source:
        return source.notes, list(source.read(dict.fromkeys(columns, "--text-column")))


def test_detected_settings_are_noted(tmp_path: Path) -> None:
    assert records(tmp_path / "a.csv", b"id,text\n")[0] == []
    assert records(tmp_path / "a.tsv", b"id\ttext\n")[0] == []
    assert records(tmp_path / "a.csv", b"id;text\n", RowOptions(";"))[0] == []
    assert records(tmp_path / "a.csv", b"id;text\n")[0] == ["read with the delimiter semicolon, by its header"]
    assert records(tmp_path / "a.tsv", b"id,text\n")[0] == ["read with the delimiter comma, by its header"]
    assert records(tmp_path / "a.csv", b"sep=|\nid|text\n")[0] == ["read with the delimiter pipe, by its first line"]
    (note,) = records(tmp_path / "a.csv", "id,text\n".encode("utf-16"))[0]
    assert "UTF-16" in note


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_rows_have_their_number_and_line(end: bytes, tmp_path: Path) -> None:
    content = end.join([b"sep=;", b"text;x", b'"a', b'b";1', b"", b"c", b"d;2", b'"e"f;3', b"\xff;4", b"g;5"])
    _, rows = records(tmp_path / "a.csv", content)
    assert [(row.number, row.place) for row in rows] == [
        (number, f"F, line {line}") for number, line in enumerate((3, 6, 7, 8, 9, 10), 1)
    ]
    assert [row.values.get("text", "").split() for row in rows if row.reason is None] == [["a", "b"], ["d"], ["g"]]
    assert [row.reason.split(":")[0].split(";")[0] for row in rows if row.reason] == [
        "1 cell, the header has 2",
        "not CSV",
        "not UTF-8",
    ]


@pytest.mark.parametrize("rest", [b"", b'4,"d"\n', b'4,""\n', b'4,"d, ""e"""\n5,f\n'])
def test_an_unclosed_quotation_mark_costs_one_line(rest: bytes, tmp_path: Path) -> None:
    _, rows = records(tmp_path / "a.csv", b'id,text\n1,a\n2,"b\n3,c\n' + rest, columns=("id",))
    assert [row.values.get("id") for row in rows] == ["1", None, "3", "4", "5"][: 3 + rest.count(b"\n")]
    assert [(row.place, row.raw) for row in rows if row.reason] == [("F, line 3", '2,"b')]
    assert [row.place for row in rows][2] == "F, line 4"


def test_a_tsv_cell_may_hold_a_carriage_return(tmp_path: Path) -> None:
    _, rows = records(tmp_path / "a.tsv", b"id\ttext\r\n1\ta\rb\r\n2\t\r\n")
    assert [(row.values["text"], row.reason) for row in rows] == [("a\rb", None), ("", None)]


def test_column_names_in_messages_are_printable(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a\x1b[2Jb," + b"x" * 500 + b"\n1,2\n")
    with opened(tmp_path / "a.csv") as source:
        message = str(source.missing("text", "--text-column"))
    assert "choose with --text-column: a [2Jb, xxx" in message
    assert message.isprintable()
    assert len(message) < 400


def test_invalid_bytes_in_unused_columns_are_ignored(tmp_path: Path) -> None:
    _, rows = records(tmp_path / "a.csv", b"text,x\na,\xff\n")
    assert [(row.values, row.reason) for row in rows] == [({"text": "a"}, None)]


def test_a_line_without_end_is_one_invalid_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    _, rows = records(tmp_path / "a.csv", b"text,x\na,1\n" + b"x" * 1000 + b",2\nb,3\n")
    assert [row.values.get("text") for row in rows] == ["a", None, "b"]
    assert rows[1].reason.startswith("longer than")


@pytest.mark.parametrize(
    ("row", "last", "after"),
    [
        (b'"' + b"b" * 20 + b"\n" + b"c" * 20 + b"\n" * 200 + b'",1\n', 203, ["z"]),  # a long cell
        (b"x" + b',"q\n"' * 100 + b"\n", 102, ["z"]),  # many cells
        (b'"' + b"c" * 20 + b"\n" + b"d\n" * 200, 203, []),  # never closed
    ],
)
def test_a_row_of_many_lines_that_is_too_long_is_one_invalid_row(
    row: bytes, last: int, after: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    _, rows = records(tmp_path / "a.csv", b"text,x\n" + row + b"z,3\n")
    assert [item.values["text"] for item in rows if item.reason is None] == after
    assert [item.reason for item in rows if item.reason] == [f"longer than 0 MiB (lines 2 to {last})"]


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"gr\xf6\xdfe,text\n", RowOptions(), "line 1: not UTF-8; name the file's encoding with --encoding, such as cp1252"),
        ("id,text\n".encode("utf-16-le"), RowOptions(), "without a byte order mark; read it with --encoding utf-16-le"),
        ("id,text\n".encode("utf-16-be"), RowOptions(), "--encoding utf-16-be"),
        ("id,text\n".encode("utf-16"), RowOptions(encoding="cp1252"), "UTF-16 by its byte order mark; leave --encoding out"),
        ("id,text\n".encode("utf-16-le"), RowOptions(encoding="utf-16"), "no byte order mark; say --encoding utf-16-le"),
        ("id,text\n".encode("utf-8-sig"), RowOptions(encoding="cp1252"), "UTF-8 by its byte order mark"),
    ],
)  # fmt: skip
def test_the_advice_for_a_wrong_encoding(content: bytes, options: RowOptions, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        records(tmp_path / "a.csv", content, options)
    assert words in str(caught.value)


def test_damaged_utf16_is_an_invalid_row(tmp_path: Path) -> None:
    content = "text\nfine\n".encode("utf-16") + b"\x00\xd8" + "half\nlast\n".encode("utf-16-le")
    _, rows = records(tmp_path / "a.csv", content)
    assert [row.values["text"] for row in rows if row.reason is None] == ["fine", "last"]
    assert [row.reason.split(";")[0] for row in rows if row.reason] == ["not UTF-16"]
