"""Labelled texts and scored pairs in tables, and errors in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qembed.errors import BadInput
from qembed.eval.readers import tables
from qembed.text.rows.options import RowOptions


def test_labelled_texts_in_one_file_or_two(tmp_path: Path) -> None:
    rows = 'text,label,language\n"Where, now?",a,en\nWo?,b,de\n"two\nlines",a,en\nJetzt,b,de\n'
    (tmp_path / "one.csv").write_text(rows)
    labelled = tables.labelled(str(tmp_path / "one.csv"))
    assert [text.text for text in labelled.texts] == ["Where, now?", "Wo?", "two\nlines", "Jetzt"]
    assert labelled.labels == ["a", "b", "a", "b"]
    assert [text.language for text in labelled.texts] == ["en", "de", "en", "de"]
    assert labelled.test is None
    folder = tmp_path / "banking77"
    folder.mkdir()
    (folder / "train.csv").write_text("text,category\nx,a\ny,b\n")
    (folder / "test.csv").write_text("text,category\nz,a\nw,b\n")
    assert tables.labelled(str(folder)).test == [False, False, True, True]
    lines = [{"text": "x", "label": 1, "split": "train"}, {"text": "y", "label": 2, "split": "train"}]
    lines += [{"text": "z", "label": 1, "split": "test"}] * 2
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labelled = tables.labelled(str(tmp_path / "l.jsonl"), "Sort it")
    assert labelled.test == [False, False, True, True]
    assert labelled.labels == ["1", "2", "1", "1"]
    assert (labelled.texts[0].kind, labelled.texts[0].instruction) == ("query", "Sort it")


def test_columns_with_other_names(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\tc\nx\ty\t1\nz\tw\t2.5\nv\tu\t3\n")
    pairs = tables.pairs(f"{path}:a,b,c")
    assert [text.text for text in pairs.first] == ["x", "z", "v"]
    assert [text.text for text in pairs.second] == ["y", "w", "u"]
    assert pairs.scores == [1.0, 2.5, 3.0]
    with pytest.raises(BadInput, match="name 3 columns after the colon"):
        tables.pairs(f"{path}:a,b")
    with pytest.raises(BadInput, match=r"line 2: no column for the first text \(d\); there are: a, b, c"):
        tables.pairs(f"{path}:d,b,c")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.csv", "", r"l\.csv: 0 texts; at least four"),
        ("l.csv", "text,label\n", "0 texts; at least four"),
        ("l.csv", "text,label\nx,a\n", "1 text; at least four"),
        ("l.csv", "text,colour\nx,red\n", r"line 2: no column for the label \(label or category .*\); there are: text, colour"),
        ("l.csv", "label\na\n", "no column for the text"),
        ("l.csv", "body,label\nx,a\n", "there are: body, label; name yours as FILE:COLUMN,COLUMN"),
        ("l.csv", "body/label\nx/a\n", "there are: body/label; .*the delimiter is comma; --delimiter names another"),
        ("l.csv", "text,label\nx,a,b\n", "line 2: 3 cells, the header has 2"),
        ("l.csv", 'text,label\n"x,a\n', "line 2: not CSV: unexpected end of data"),
        ("l.csv", "text,label\n,a\n", "line 2: the text is empty"),
        ("l.csv", "text,label\nx,\n", "line 2: the label is empty"),
        ("l.csv", "text,label,split\nx,a,training\n", "the split 'training' is none of"),
        ("l.csv", "text,label,split\nx,a,train\ny,b,\nz,a,test\nw,b,test\n", "some rows name a split and some do not"),
        ("l.txt", "x", r"name it \.csv, \.tsv .* or \.jsonl"),
        ("l.jsonl", '{"text": "x"', "line 1: not JSON"),
        ("l.jsonl", '{"text": 1.5, "label": "a"}', "line 1: the text is not a text"),
    ],
)
def test_errors_in_labelled_texts(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=words) as caught:
        tables.labelled(str(tmp_path / name))
    assert str(tmp_path) in str(caught.value)


def test_decimal_commas_are_read_unless_the_comma_is_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("sentence1;sentence2;score\na;b;4,5\nc;d;-0,25\ne;f;1.5\n")
    assert tables.pairs(str(tmp_path / "p.csv")).scores == [4.5, -0.25, 1.5]
    (tmp_path / "q.csv").write_text('sentence1,sentence2,score\na,b,"4,5"\n')
    with pytest.raises(BadInput, match="the score '4,5' is not a number"):
        tables.pairs(str(tmp_path / "q.csv"))


def test_tables_without_a_header_and_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes("grün|blau|1\nrot|gelb|2\nweiß|grau|3\n".encode("cp1252"))
    pairs = tables.pairs(f"{tmp_path / 'p.csv'}:1,2,3", None, RowOptions("|", "cp1252", header=False))
    assert [text.text for text in pairs.first] == ["grün", "rot", "weiß"]
    notes: list[str] = []
    tables.pairs(f"{tmp_path / 'p.csv'}:1,2,3", None, RowOptions(None, "cp1252", header=False), notes.append)
    assert notes == [f"{tmp_path / 'p.csv'}: read with the delimiter pipe, by its first lines"]


def test_labels_of_pandas(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as arrow

    table = arrow.table({"text": list("abcd"), "label": [1.0, 2.0, 1.0, 2.0], "language": ["en", None, "en", "de"]})
    pyarrow.write_table(table, tmp_path / "l.parquet")
    labelled = tables.labelled(str(tmp_path / "l.parquet"))
    assert labelled.labels == ["1", "2", "1", "2"]
    assert [text.language for text in labelled.texts] == ["en", None, "en", "de"]


def test_white_space_makes_no_other_label(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("text,label\na,x\nb, x\nc,y\nd,y \n")
    assert tables.labelled(str(tmp_path / "l.csv")).labels == ["x", "x", "y", "y"]


def test_a_text_of_half_a_megabyte_is_read(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("text,label\n" + "word " * 100_000 + ",a\nx,b\ny,a\nz,b\n")
    assert len(tables.labelled(str(tmp_path / "l.csv")).texts[0].text) == 500_000


def test_the_line_of_invalid_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("text,label\nx,a\nna\xefve,b\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"line 3: not UTF-8"):
        tables.labelled(str(tmp_path / "l.csv"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"holds no pairs"),
        ("sentence1,sentence2,score\nx,y,high\n", "line 2: the score 'high' is not a number"),
        ("sentence1,sentence2,score\nx,y,nan\n", "the score 'nan' is not a number"),
        ("sentence1,sentence2,score\nx,y,1_0\n", "the score '1_0' is not a number"),
        ("sentence1,sentence2\nx,y\n", "no column for the score"),
        ("sentence1,score\nx,1\n", "no column for the second text"),
    ],
)
def test_errors_in_pairs(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(BadInput, match=words):
        tables.pairs(str(tmp_path / "p.csv"))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.csv: no such file"):
        tables.labelled(str(tmp_path / "none.csv"))
    with pytest.raises(BadInput, match=r"none\.csv: no such file"):
        tables.pairs(str(tmp_path / "none.csv") + ":a,b,c")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match=r"folder: no train\.csv"):
        tables.labelled(str(tmp_path / "folder"))
