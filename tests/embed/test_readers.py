"""Input rows of every format; each row that cannot be embedded is rejected with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from .conftest import Embed, expected, ids, rejects


def test_lines_of_text_are_identified_by_number_and_bad_lines_rejected(embed: Embed, tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.npy"
    # A byte order mark, Windows line ends, Unicode line separators in a line, an empty line, one of invisible characters.
    source.write_bytes(
        "\ufefffirst\r\nsecond\u2028still second\x0band now\n\n\u200b\u200d\n".encode()
        + b"broken \xff\xfe\n"
        + b"word " * 100
        + b"\nlast without an end"
    )
    result = embed(source, "-o", out, "--json")
    assert result.exit_code == 4
    summary = json.loads(result.stdout)
    assert (summary["vectors"], summary["rejected"], summary["rows"]) == (3, 4, 7)
    assert ids(out) == ["1", "2", "7"]
    texts = ["first", "second\u2028still second\nand now", "last without an end"]
    np.testing.assert_array_equal(np.load(out), np.stack([expected(text) for text in texts]))
    rejected = rejects(tmp_path / "out.rejects.jsonl")
    assert [(reject["id"], reject["place"]) for reject in rejected] == [(str(n), f"in.txt, line {n}") for n in (3, 4, 5, 6)]
    assert [reject["reason"].split(" (")[0] for reject in rejected[:3]] == [
        "empty",
        "empty after invisible characters are removed",
        "not UTF-8",
    ]
    assert rejected[3]["reason"].startswith("too long: 102 tokens, the limit is 64")
    assert f"4 rows were rejected; {tmp_path / 'out.rejects.jsonl'}" in result.stderr


def test_bad_json_lines(embed: Embed, tmp_path: Path) -> None:
    lines = [
        '{"text": "fine", "id": 7}',
        "{broken",
        '["no", "object"]',
        '{"id": "no text"}',
        '{"text": 5}',
        '{"text": "half \\ud800"}',
        "",
        '{"text": "fine too", "id": "x"}',
        '{"text": "an id that is none", "id": [1]}',
        "[" * 100_000,
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    result = embed(tmp_path / "in.jsonl", "-o", tmp_path / "out.npy")
    assert result.exit_code == 4
    assert ids(tmp_path / "out.npy") == ["7", "x"]
    rejected = rejects(tmp_path / "out.rejects.jsonl")
    assert [reject["place"] for reject in rejected] == [f"in.jsonl, line {n}" for n in (2, 3, 4, 5, 6, 9, 10)]
    reasons = [reject["reason"] for reject in rejected]
    for word, reason in zip(
        ["not JSON", "not a JSON object", "text is missing", "text is not a text", "surrogate", "id is no id", "not JSON"],
        reasons,
        strict=True,
    ):
        assert word in reason


def test_bad_csv_rows(embed: Embed, tmp_path: Path) -> None:
    content = b'id,title,body\na,One,"first, with\na line break"\nb,Two\nc,Three,\xff\nd,Four,last\n,Five,numbered\n'
    (tmp_path / "in.csv").write_bytes(content)
    arguments = ["--text-column", "body", "--keep", "title"]
    result = embed(tmp_path / "in.csv", "-o", tmp_path / "out.npy", *arguments)
    assert result.exit_code == 4
    assert ids(tmp_path / "out.npy") == ["a", "d", "row 5"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy")[0], expected("first, with\na line break"))
    assert [(reject["id"], reject["reason"]) for reject in rejects(tmp_path / "out.rejects.jsonl")] == [
        ("row 2", "2 cells, the header has 3"),
        ("c", "not UTF-8; name the file's encoding with --encoding, such as cp1252"),
    ]


def test_bad_tsv_rows(embed: Embed, tmp_path: Path) -> None:
    content = b'id\ttitle\tbody\na\tOne\t"first, with\nb\tTwo\nc\tThree\t\xff\nd\tFour\tlast"\n\tFive\tnumbered\n'
    (tmp_path / "in.tsv").write_bytes(content)
    result = embed(tmp_path / "in.tsv", "-o", tmp_path / "out.npy", "--text-column", "body")
    assert result.exit_code == 4
    assert ids(tmp_path / "out.npy") == ["a", "d", "row 5"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy")[:2], [expected('"first, with'), expected('last"')])
    assert [(reject["id"], reject["reason"]) for reject in rejects(tmp_path / "out.rejects.jsonl")] == [
        ("row 2", "2 cells, the header has 3"),
        ("c", "not UTF-8; name the file's encoding with --encoding, such as cp1252"),
    ]


def test_parquet_with_nulls_and_strings_that_are_not_utf8(embed: Embed, tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"\xff\xfe", b"also good"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    table = pyarrow.table({"key": pyarrow.array([1, 2, 3]), "text": text, "when": pyarrow.array([1, 2, 3], pyarrow.date32())})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    result = embed(tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", "--id-column", "key", "--keep", "when")
    assert result.exit_code == 4
    output = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert output["id"].to_pylist() == ["1", "3"]
    assert output["when"].to_pylist() == ["1970-01-02", "1970-01-04"]
    assert [(reject["place"], reject["reason"]) for reject in rejects(tmp_path / "out.rejects.jsonl")] == [
        ("in.parquet, row 2", "not UTF-8")
    ]


def test_a_folder_is_read_recursively_in_order_without_the_runs_own_output(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("from b\n")
    (tmp_path / "a.jsonl").write_text('{"text": "from a"}\n{"text": "again", "id": "own"}\n')
    (tmp_path / "c.csv").write_text("text\nfrom c\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden\n")
    out = tmp_path / "vectors.npy"
    for options in ([], ["--force"]):
        result = embed(tmp_path, "-o", out, *options)
        assert result.exit_code == 0, result.output
        assert ids(out) == ["a.jsonl:1", "own", "c.csv:1", "b/one.txt:1"]


def test_standard_input(embed: Embed, tmp_path: Path) -> None:
    assert embed("-", "-o", tmp_path / "a.npy", input="one\ntwo\n").exit_code == 0
    rows = '{"text": "one"}\n{"text": "two"}\n'
    assert embed("-", "-o", tmp_path / "b.npy", "--input-format", "jsonl", input=rows).exit_code == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert ids(tmp_path / "a.npy") == ["1", "2"]
    refused = embed("-", "-o", tmp_path / "c.npy", "--input-format", "parquet", input="")
    assert refused.exit_code == 2
    assert "standard input" in refused.stderr


def test_strict_stops_at_the_first_bad_row_and_resumes_once_it_is_fixed(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qembed.embed import windows

    monkeypatch.setattr(windows, "ROWS", 4)
    lines = [f"text {n}" for n in range(20)]
    source, out = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("\n".join([*lines[:10], "", *lines[11:]]))
    result = embed(source, "-o", out, "--strict")
    assert result.exit_code == 2
    assert "in.txt, line 11: empty (--strict)" in result.stderr
    assert not out.exists()
    source.write_text("\n".join(lines))
    result = embed(source, "-o", out, "--strict", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["resumed"] == 8
    np.testing.assert_array_equal(np.load(out), np.stack([expected(line) for line in lines]))


def test_an_input_without_texts_is_bad_input(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "in.xyz").write_text("a")
    for source, words in (
        ("empty.txt", "holds no texts"),
        ("empty", "no supported file"),
        ("in.xyz", "unknown suffix"),
        ("nothing.txt", "no such file or folder"),
    ):
        result = embed(tmp_path / source, "-o", tmp_path / "out.npy")
        assert result.exit_code == 2
        assert words in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "empty.txt", "in.xyz"]


def test_an_endless_line_does_not_fill_the_memory(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qembed.text.rows import lines

    monkeypatch.setattr(lines, "LONGEST_LINE", 1000)
    (tmp_path / "in.txt").write_text("a\n" + "x" * 5000 + "\nb\n")
    assert embed(tmp_path / "in.txt", "-o", tmp_path / "out.npy").exit_code == 4
    assert ids(tmp_path / "out.npy") == ["1", "3"]
    assert rejects(tmp_path / "out.rejects.jsonl")[0]["reason"].startswith("longer than")
