"""Users' data sets: BEIR folders, SQuAD's and XQuAD's JSON, labelled texts, scored pairs; and the errors in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qembed.errors import BadInput
from qembed.eval.readers import beir, squad, tables
from qembed.text.rows.options import RowOptions

CORPUS = [
    {"_id": "p1", "title": "Swifts", "text": "They sleep in the air.", "metadata": {"language": "en"}},
    {"_id": "p2", "title": "", "text": "Mauersegler schlafen im Flug.", "metadata": {"language": "de"}},
    {"_id": "p3", "text": "Ein Stein."},
]
QUERIES = [{"_id": "q1", "text": "Where do swifts sleep?", "language": "en"}, {"_id": "q2", "text": "not judged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\tp1\t2\nq1\tp2\t1\nq1\tp3\t0\n"


def beir_folder(path: Path, corpus: Any = CORPUS, queries: Any = QUERIES, qrels: str = QRELS, split: str = "test") -> Path:
    (path / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "qrels" / f"{split}.tsv").write_text(qrels)
    return path


def test_beir_in_its_published_layout(tmp_path: Path) -> None:
    collection = beir.read(beir_folder(tmp_path / "set"))
    assert collection.name == "set"
    assert [text.text for text in collection.passages] == [
        "Swifts They sleep in the air.",
        "Mauersegler schlafen im Flug.",
        "Ein Stein.",
    ]
    assert [text.language for text in collection.passages] == ["en", "de", None]
    assert [(text.id, text.kind, text.language) for text in collection.queries] == [("q1", "query", "en")]
    assert collection.relevant == [{0: 2, 1: 1}]
    assert beir.read(beir_folder(tmp_path / "dev", split="dev"), "Find birds").queries[0].instruction == "Find birds"


def test_trec_columns_and_no_header(tmp_path: Path) -> None:
    assert beir.read(beir_folder(tmp_path / "a", qrels="q1\t0\tp1\t1\n")).relevant == [{0: 1}]
    assert beir.read(beir_folder(tmp_path / "b", qrels="q1\tp2\t1\n")).relevant == [{1: 1}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "holds no judgements"),
        ({"qrels": "q1\tp1\t0\n"}, "names no relevant passage"),
        ({"qrels": "q1 p1 1\n"}, "line 1: not query-id, corpus-id and score with tabs between"),
        ({"qrels": "q1\tp1\tmuch\n"}, "line 1: not query-id"),
        ({"qrels": "q1\tp1\tinf\n"}, "line 1: not query-id"),
        ({"corpus": []}, r"corpus\.jsonl: holds no texts"),
        ({"corpus": [*CORPUS, CORPUS[0]]}, r"corpus\.jsonl, line 4: the _id 'p1' occurs twice"),
        ({"corpus": [{"text": "a"}]}, r"corpus\.jsonl, line 1: _id is missing"),
        ({"queries": [{"_id": "q1"}]}, r"queries\.jsonl, line 1: text is missing"),
        ({"queries": [{"_id": "q1", "text": " "}]}, "text is empty"),
        ({"queries": ["q1"]}, "line 1: not a JSON object"),
    ],
)
def test_errors_in_a_beir_folder(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = beir_folder(tmp_path / "set", **change)
    with pytest.raises(BadInput, match=words):
        beir.read(folder)


def test_a_beir_folder_without_a_file(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "set")
    (folder / "qrels" / "test.tsv").unlink()
    with pytest.raises(BadInput, match=r"no qrels/test\.tsv"):
        beir.read(folder)


def test_the_error_for_another_encoding_in_a_beir_folder_suggests_no_option(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "set")
    (folder / "queries.jsonl").write_bytes('{"_id": "q1", "text": "gr\xf6\xdfer"}'.encode("latin-1"))
    with pytest.raises(BadInput, match=r"queries\.jsonl, line 1: not UTF-8 \(byte \d+\)$"):
        beir.read(folder)


def xquad(path: Path, language: str, texts: list[tuple[str, list[str]]]) -> Path:
    paragraphs = [
        {"context": context, "qas": [{"id": f"{row}{place}", "question": question} for place, question in enumerate(questions)]}
        for row, (context, questions) in enumerate(texts)
    ]
    file = path / f"xquad.{language}.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return file


def test_xquad_across_languages(tmp_path: Path) -> None:
    files = [
        xquad(tmp_path, "en", [("One.", ["1a?", "1b?"]), ("Two.", ["2a?"])]),
        xquad(tmp_path, "de", [("Eins.", ["1a??", "1b??"]), ("Zwei.", ["2a??"])]),
    ]
    collection = squad.read(files)
    assert [(text.text, text.language) for text in collection.passages] == [
        ("One.", "en"),
        ("Two.", "en"),
        ("Eins.", "de"),
        ("Zwei.", "de"),
    ]
    assert [text.text for text in collection.queries] == ["1a?", "1b?", "2a?", "1a??", "1b??", "2a??"]
    assert collection.relevant == [{0: 1, 2: 1}, {0: 1, 2: 1}, {1: 1, 3: 1}] * 2
    assert len({text.id for text in collection.queries}) == 6
    english = squad.read(files[:1])
    assert english.relevant == [{0: 1}, {0: 1}, {1: 1}]
    assert english.name == "xquad.en.json"


@pytest.mark.parametrize(("name", "language"), [("xquad.de.json", "de"), ("train-v2.0.json", None), ("squad_fr.json", "fr")])
def test_the_language_is_read_from_the_file_name(name: str, language: str | None) -> None:
    assert squad.language_of(Path(name)) == language


def test_errors_in_squad(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, words in (
        ("{}", "not SQuAD's JSON"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"data": []}', "holds no questions"),
        ('{"data": [{"paragraphs": [{"context": "", "qas": []}]}]}', "article 1, paragraph 1: the context is empty"),
        ('{"data": [{"paragraphs": 3}]}', "not SQuAD's JSON"),
    ):
        path.write_text(content)
        with pytest.raises(BadInput, match=words):
            squad.read([path])


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
        ("l.csv", "", r"l\.csv: no texts; at least four"),
        ("l.csv", "text,label\n", "no texts; at least four"),
        ("l.csv", "text,label\nx,a\n", "1 texts; at least four"),
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


def test_a_text_of_half_a_megabyte_is_read(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("text,label\n" + "word " * 100_000 + ",a\nx,b\ny,a\nz,b\n")
    assert len(tables.labelled(str(tmp_path / "l.csv")).texts[0].text) == 500_000


def test_empty_passages_are_left_out_with_a_note(tmp_path: Path) -> None:
    collection = beir.read(beir_folder(tmp_path / "set", corpus=[*CORPUS, {"_id": "p4", "title": "", "text": " "}]))
    assert [text.id for text in collection.passages] == ["p1", "p2", "p3"]
    assert collection.notes == ("left out: 1 passage without title and text",)


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
