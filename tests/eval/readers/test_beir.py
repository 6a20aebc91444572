"""BEIR folders, and errors in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qembed.errors import BadInput
from qembed.eval.readers import beir

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
        ({"qrels": "q1\tp1\t1.0\nq1\tp2\t0.5\n"}, r"line 2: the score 0\.5 is no whole number"),
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


def test_empty_passages_are_left_out_with_a_note(tmp_path: Path) -> None:
    collection = beir.read(beir_folder(tmp_path / "set", corpus=[*CORPUS, {"_id": "p4", "title": "", "text": " "}]))
    assert [text.id for text in collection.passages] == ["p1", "p2", "p3"]
    assert collection.notes == ("left out: 1 passage without title and text",)


def test_judgements_that_are_overruled_further_down_are_counted(tmp_path: Path) -> None:
    collection = beir.read(beir_folder(tmp_path / "set", qrels="q1\tp1\t1\nq1\tp2\t1\nq1\tp1\t2\nq1\tp2\t1\n"))
    assert collection.relevant == [{0: 2, 1: 1}]
    (note,) = collection.notes
    assert note.startswith("left out: 1 judgement of a passage that has another grade")
