"""Reading texts, their prompts, and cutting them to the context."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.eval import texts
from qembed.text.texts import Text


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_plain_text_has_one_text_per_line(tmp_path: Path) -> None:
    content = "\ufeffone\r\n\n  \ntwo\u2028still two\nthree".encode()
    data = texts.read(write(tmp_path, "mine.txt", content))
    assert [(text.id, text.text, text.kind) for text in data.texts] == [
        ("1", "one", "document"),
        ("4", "two\u2028still two", "document"),
        ("5", "three", "document"),
    ]
    assert data.sha256 == hashlib.sha256(content).hexdigest()


def test_fields_of_json_objects_are_read(tmp_path: Path) -> None:
    content = b'{"id": 7, "text": "a", "kind": "query", "language": "de", "instruction": "Find", "more": [1]}\n{"text": "b"}\n'
    data = texts.read(write(tmp_path, "mine.jsonl", content))
    assert data.texts == [Text("7", "a", "query", "de", "Find"), Text("row 2", "b", "document", None, None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no texts"),
        (b"\n \n", "holds no texts"),
        (b'{"text": "a"}\n{"text": "b"', "line 2: not JSON"),
        (b'{"text": "a"}\n\n["b"]', "line 3: not a JSON object"),
        (b'{"txt": "a"}', "line 1: no text field"),
        (b'{"text": null}', "line 1: no text field"),
        (b'{"text": 5}', "line 1: text is not a string"),
        (b'{"text": " \\n"}', "line 1: the text is empty"),
        (b'{"text": "a", "kind": "poem"}', "line 1: kind 'poem' is none of query, document, code"),
        (b'{"text": "a", "language": ["de"]}', "line 1: language is not a string"),
        (b'{"text": "\\ud800"}', "line 1: text holds half of a surrogate pair"),
        (b'{"text": "a"}\n{"text": "\xff"}', r"line 2: not UTF-8 \(byte 11\)"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        texts.read(write(tmp_path, "mine.jsonl", content))
    assert "\n" not in str(caught.value)
    assert "mine.jsonl" in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.txt: cannot be read: No such file"):
        texts.read(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(BadInput, match=r"folder\.txt: cannot be read: Is a directory"):
        texts.read(tmp_path / "folder.txt")
    with pytest.raises(BadInput, match=r"texts\.doc: unknown format; call it \.txt, \.jsonl"):
        texts.read(write(tmp_path, "texts.doc", b"a"))
    with pytest.raises(BadInput, match=r"line 2: not UTF-8 \(byte 3\)"):
        texts.read(write(tmp_path, "latin.txt", "a\nna\xefve".encode("latin-1")))


def test_only_queries_get_a_prompt() -> None:
    prompts = {"query": "Q: ", "document": "D: "}
    assert Text("1", "cats", "query").model_input(prompts) == "Q: cats"
    own = Text("1", "cats", "query", instruction="Find pets")
    assert own.model_input(prompts) == "Instruct: Find pets\nQuery:cats"
    assert Text("1", "cats", "document").model_input(prompts) == "cats"
    assert Text("1", "cats()", "code", instruction="ignored").model_input(prompts) == "cats()"


def test_long_texts_are_cut_at_their_end_to_the_limit(fp16: Path) -> None:
    tokenizer = Checkpoint("tiny", fp16).tokenizer()
    # One token a byte and one appended: 9 bytes fit into 10 tokens; "ü" has two bytes.
    measured = texts.cut(["123456789", "1234567890", "1234567üü", "1234567890" * 50], tokenizer, 10)
    assert measured.texts == ["123456789", "123456789", "1234567ü", "123456789"]
    assert measured.tokens == [10, 10, 10, 10]
    assert measured.cut == 3


def test_without_a_limit_tokens_are_only_counted(fp16: Path) -> None:
    tokenizer = Checkpoint("tiny", fp16).tokenizer()
    assert texts.cut(["12345", "ü" * 40], tokenizer, None) == texts.Measured(["12345", "ü" * 40], [6, 81], 0)


def test_a_cut_never_splits_a_character(fp16: Path) -> None:
    tokenizer = Checkpoint("tiny", fp16).tokenizer()
    assert texts.cut(["12345678ü"], tokenizer, 10).texts == ["12345678"]


def test_a_context_without_room_is_refused(fp16: Path) -> None:
    tokenizer = Checkpoint("tiny", fp16).tokenizer()
    with pytest.raises(BadInput, match="context of 1 tokens"):
        texts.cut(["long"], tokenizer, 1)
