"""Tables from spreadsheets and other tools: detected settings are reported, options override them, printed advice works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from .conftest import Embed, expected, rejects

TEXTS = ["größer; schöner", "3,5 €"]
SPREADSHEET = 'id;text\r\na;"größer; schöner"\r\nb;3,5 €\r\n'


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def vectors(texts: list[str]) -> np.ndarray[Any, Any]:
    return np.stack([expected(text) for text in texts])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_spreadsheets_table_is_read_and_its_delimiter_reported(encoding: str, embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(SPREADSHEET.encode(encoding))
    result = embed(tmp_path / "in.csv", "-o", tmp_path / "out.npy", "--json")
    assert result.exit_code == 0, result.output
    assert "in.csv: read with the delimiter semicolon, by its header" in result.stderr
    assert ("UTF-16" in result.stderr) == (encoding == "utf-16")
    assert json.loads(result.stdout)["vectors"] == 2
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors(TEXTS))


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
def test_utf16_by_its_byte_order_mark(name: str, embed: Embed, tmp_path: Path) -> None:
    lines = TEXTS if name == "in.txt" else [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (tmp_path / name).write_bytes("\r\n".join(lines).encode("utf-16"))
    assert embed(tmp_path / name, "-o", tmp_path / "out.npy").exit_code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors(TEXTS))


def test_the_advice_for_another_encoding_works(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(SPREADSHEET.encode("cp1252"))
    assert embed(tmp_path / "in.csv", "-o", tmp_path / "out.npy").exit_code == 4
    reasons = {reject["reason"] for reject in rejects(tmp_path / "out.rejects.jsonl")}
    (advice,) = {match for reason in reasons for match in re.findall(r"(--encoding), such as (\S+)$", reason)}
    result = embed(tmp_path / "in.csv", "-o", tmp_path / "out.npy", *advice, "--force")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors(TEXTS))


def test_the_advice_for_a_missing_column_works(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("one text\nand another, with a comma\n")
    out = ("-o", tmp_path / "out.npy")
    refused = embed(tmp_path / "in.csv", *out)
    assert refused.exit_code == 2
    assert "no column 'text'; choose with --text-column: one text (" in refused.stderr
    assert "--no-header" in refused.stderr
    assert "--delimiter" in refused.stderr
    refused = embed(tmp_path / "in.csv", *out, "--no-header")
    assert refused.exit_code == 2
    assert "choose with --text-column: 1 (" in refused.stderr
    result = embed(tmp_path / "in.csv", *out, "--no-header", "--text-column", "1", "--delimiter", "|")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors(["one text", "and another, with a comma"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--delimiter", ";"], "--delimiter applies to CSV and TSV"),
        (["--no-header"], "--no-header applies to CSV and TSV"),
        (["--encoding", "utf-9"], "--encoding utf-9: unknown"),
        (["--encoding", "hex"], "--encoding hex: unknown"),
        (["--delimiter", ";;"], "not one character"),
    ],
)
def test_options_that_do_not_apply_are_refused(options: list[str], words: str, embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    refused = embed(tmp_path / "in.jsonl", "-o", tmp_path / "out.npy", *options)
    assert refused.exit_code == 2
    assert words in refused.stderr


def test_ids_of_pandas_and_of_beir(embed: Embed, tmp_path: Path) -> None:
    table = pyarrow.table({"id": [1.0, None, float("nan"), 2.5, 4.0], "text": list("abcde")})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    out = tmp_path / "out.jsonl"
    assert embed(tmp_path / "in.parquet", "-o", out).exit_code == 0
    assert [row["id"] for row in rows(out)] == ["1", "row 2", "row 3", "2.5", "4"]
    assert embed(tmp_path / "in.parquet", "-o", out, "--id-column", "id", "--force").exit_code == 4
    assert [row["id"] for row in rows(out)] == ["1", "2.5", "4"]
    assert [reject["reason"] for reject in rejects(tmp_path / "out.rejects.jsonl")] == ["id is missing"] * 2
    (tmp_path / "corpus.jsonl").write_text('{"_id": "doc7", "text": "a"}\n{"_id": "doc8", "id": "own", "text": "b"}\n')
    result = embed(tmp_path / "corpus.jsonl", "-o", out, "--force")
    assert [row["id"] for row in rows(out)] == ["doc7", "own"]
    assert "corpus.jsonl: ids are taken from '_id'" in result.stderr
    (tmp_path / "corpus.tsv").write_text("_id\ttext\ndoc7\ta\n")
    assert "ids are taken from '_id'" in embed(tmp_path / "corpus.tsv", "-o", out, "--force").stderr
    assert [row["id"] for row in rows(out)] == ["doc7"]


def test_duplicate_fields_are_rejected(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    assert embed(tmp_path / "in.jsonl", "-o", tmp_path / "out.npy").exit_code == 4
    assert [reject["reason"] for reject in rejects(tmp_path / "out.rejects.jsonl")] == ["two fields are named 'text'"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv", "npy"])
def test_kept_values_can_be_stored_anywhere(suffix: str, embed: Embed, tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a"], "raw": [b"\0\xff"], "note": ["x\0y"], "more": [{"z\0": ["w\0"], "b": b"\1"}]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    keep = [part for name in ("text", "raw", "note", "more") for part in ("--keep", name)]
    out = tmp_path / f"out.{suffix}"
    assert embed(tmp_path / "in.parquet", "-o", out, *keep).exit_code == 0
    if suffix == "parquet":
        (row,) = pyarrow.parquet.read_table(out).to_pylist()
        assert (row["raw"], row["note"], json.loads(row["more"])) == ("00ff", "xy", {"z": ["w"], "b": "01"})
    elif suffix == "csv":
        content = out.read_text("utf-8")
        assert "\0" not in content
        assert ",00ff,xy," in content
    else:
        (row,) = rows(out if suffix == "jsonl" else tmp_path / "out.ids.jsonl")
        assert (row["raw"], row["note"], row["more"]) == ("00ff", "xy", {"z": ["w"], "b": "01"})


def test_kept_values_that_are_no_unicode_reject_their_row(embed: Embed, tmp_path: Path) -> None:
    lines = [
        r'{"text": "a", "note": "\ud800"}',
        r'{"text": "b", "note": {"x": ["\udfff"]}}',
        r'{"text": "c", "note": "\ud83d\ude00"}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    assert embed(tmp_path / "in.jsonl", "-o", out, "--keep", "note").exit_code == 4
    assert [row["note"] for row in rows(out)] == ["\U0001f600"]
    assert [reject["reason"].split(" of ")[0] for reject in rejects(tmp_path / "out.rejects.jsonl")] == ["note holds half"] * 2


def test_integers_beside_floats_keep_their_digits(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(f'{{"text": "a", "n": {2**53 + 1}}}\n{{"text": "b", "n": 1.5}}\n')
    out = tmp_path / "out.parquet"
    result = embed(tmp_path / "in.jsonl", "-o", out, "--keep", "n")
    assert result.exit_code == 0, result.output
    assert [row["n"] for row in pyarrow.parquet.read_table(out).to_pylist()] == [str(2**53 + 1), "1.5"]


def test_a_chunks_kept_text_holds_no_nul(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "some\0 words. " * 20}) + "\n")
    out = tmp_path / "out.jsonl"
    assert embed(tmp_path / "in.jsonl", "-o", out, "--chunk-tokens", "16", "--keep", "text").exit_code == 0
    chunks = rows(out)
    assert len(chunks) > 1
    assert not any("\0" in chunk["text"] for chunk in chunks)


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_documents_that_are_text_have_an_encoding_too(name: str, embed: Embed, tmp_path: Path) -> None:
    options = ["--txt", "document", "--keep", "text", "--force", "-o", tmp_path / "out.jsonl"]
    for encoding, given in (("cp1252", ["--encoding", "cp1252"]), ("utf-16", []), ("utf-8-sig", [])):
        (tmp_path / name).write_bytes("größer".encode(encoding))
        assert embed(tmp_path / name, *options, *given).exit_code == 0
        assert [row["text"] for row in rows(tmp_path / "out.jsonl")] == ["größer"]
    (tmp_path / name).write_bytes("größer".encode("cp1252"))
    assert embed(tmp_path / name, *options).exit_code == 4
    assert "--encoding, such as cp1252" in rejects(tmp_path / "out.rejects.jsonl")[0]["reason"]
    (tmp_path / "a.html").write_text("<p>a</p>")
    refused = embed(tmp_path / "a.html", *options, "--encoding", "cp1252")
    assert (refused.exit_code, "--encoding applies to" in refused.stderr) == (2, True)
