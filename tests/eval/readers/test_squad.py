"""SQuAD's and XQuAD's JSON, and errors in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qembed.errors import BadInput
from qembed.eval.readers import squad


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
