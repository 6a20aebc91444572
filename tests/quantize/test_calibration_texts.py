"""Calibration texts from a user's file: every format, sampling, and the error for every kind of damage."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qembed.errors import BadInput, MissingExtra
from qembed.quantize import calibration_texts
from qembed.quantize.calibration import prepare
from qembed.text.rows.options import RowOptions
from tests.checkpoints import MakeCheckpoint

from .conftest import assert_refused, quantize

ROWS: list[dict[str, Any]] = [
    {"text": f"text {number}", "body": f"body {number}", "kind": "query" if number % 3 == 0 else "document"}
    for number in range(200)
]
ROWS[0]["instruction"] = "Find it"


def write_txt(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{row['text']}\n\n" for row in rows))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "body", "kind", "instruction"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = [("a.jsonl", write_jsonl), ("a.csv", write_csv), ("a.tsv", write_csv), ("a.parquet", write_parquet)]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_every_format_yields_texts_kinds_and_instructions(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    write(tmp_path / name, ROWS)
    sample = calibration_texts.read(str(tmp_path / name), 1000, 0)
    assert [text.text for text in sample.texts] == [row["text"] for row in ROWS]
    assert [text.kind for text in sample.texts] == [row["kind"] for row in ROWS]
    prompts = {"query": "Q: ", "document": ""}
    assert sample.texts[0].model_input(prompts) == "Instruct: Find it\nQuery:text 0"
    assert sample.texts[1].model_input(prompts) == "text 1"
    assert sample.texts[3].model_input(prompts) == "Q: text 3"
    assert sample.source == name
    assert calibration_texts.read(f"{tmp_path / name}:body", 1000, 0).texts[5].text == "body 5"


def test_txt_has_one_text_per_line(tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", ROWS)
    sample = calibration_texts.read(str(tmp_path / "a.txt"), 1000, 0)
    assert [text.text for text in sample.texts] == [row["text"] for row in ROWS]
    with pytest.raises(BadInput, match="no columns"):
        calibration_texts.read(f"{tmp_path / 'a.txt'}:body", 1000, 0)


def test_csv_texts_may_contain_newlines(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"text": f"one\ntwo {number}", "kind": "code"} for number in range(64)])
    assert calibration_texts.read(str(tmp_path / "a.csv"), 64, 0).texts[3].text == "one\ntwo 3"


def test_sampling_is_uniform_reproducible_and_in_file_order(tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", ROWS)
    path = str(tmp_path / "a.txt")
    order = {row["text"]: number for number, row in enumerate(ROWS)}
    samples = [[order[text.text] for text in calibration_texts.read(path, 64, seed).texts] for seed in range(200)]
    assert samples[0] == [order[text.text] for text in calibration_texts.read(path, 64, 0).texts]
    assert samples[0] != samples[1]
    assert all(numbers == sorted(set(numbers)) and len(numbers) == 64 for numbers in samples)
    frequencies = [sum(number in numbers for numbers in samples) for number in range(200)]
    assert 35 < min(frequencies) < max(frequencies) < 95  # 64 expected, standard deviation 6.6


def test_files_are_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    alive = peak = 0

    class Counted(calibration_texts.Text):
        def __post_init__(self) -> None:
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(calibration_texts, "Text", Counted)
    assert len(calibration_texts.read(str(tmp_path / "a.jsonl"), 64, 0).texts) == 64
    assert peak < 70


def test_file_names_may_contain_a_colon(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a:body.jsonl", ROWS)
    assert calibration_texts.read(str(tmp_path / "a:body.jsonl"), 64, 0).source == "a:body.jsonl"
    assert calibration_texts.read(f"{tmp_path / 'a:body.jsonl'}:body", 200, 0).texts[0].text == "body 0"


def test_tables_of_spreadsheets(tmp_path: Path) -> None:
    lines = [f'{number};"größer; {number},5"' for number in range(64)]
    notes: list[str] = []
    for name, encoding in (("a.csv", "utf-8-sig"), ("b.csv", "utf-16")):
        (tmp_path / name).write_bytes("\r\n".join(["id;text", *lines]).encode(encoding))
        sample = calibration_texts.read(str(tmp_path / name), 64, 0, on_note=notes.append)
        assert sample.texts[3].text == "größer; 3,5"
    assert notes[0] == f"{tmp_path / 'a.csv'}: read with the delimiter semicolon, by its header"
    (tmp_path / "c.csv").write_bytes("\n".join(lines).encode("cp1252"))
    options = RowOptions(";", "cp1252", header=False)
    assert calibration_texts.read(f"{tmp_path / 'c.csv'}:2", 64, 0, options).texts[3].text == "größer; 3,5"
    with pytest.raises(BadInput, match=r"no column 'text'; choose with c\.csv:COLUMN: 1, 2 \(the delimiter is semicolon"):
        calibration_texts.read(str(tmp_path / "c.csv"), 64, 0, options)


LINES = [json.dumps(row) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "no texts, at least 64"),
        ("a.txt", b"one\ntwo\n", "2 texts, at least 64"),
        ("a.txt", b"good\nb\xffd\n", "line 2: not UTF-8"),
        ("a.csv", b"text\ngood\nb\xffd\n", "line 3: not UTF-8"),
        ("a.csv", b"", "no column 'text'"),
        ("a.csv", b"body,kind\na,query\n", "no column 'text'; choose with a.csv:COLUMN: body, kind"),
        ("a.csv", b"text\na\n,\n", "line 3: 2 cells, the header has 1"),
        ("a.csv", b'text,body\n"",x\n', "line 2: the text is empty"),
        ("a.csv", b'text\n"never closed\n', "line 2: not CSV"),
        ("a.jsonl", f"{LINES[0]}\n{{".encode(), "line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b"[1]", "line 1: not a JSON object"),
        ("a.jsonl", b'{"body": "x"}', "line 1: no field 'text'"),
        ("a.jsonl", b'{"text": 5}', "line 1: text is not a string"),
        ("a.jsonl", b'{"text": " "}', "line 1: the text is empty"),
        ("a.jsonl", b'{"text": null}', "line 1: the text is empty"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: text holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "x", "kind": "question"}', "line 1: kind 'question' is unknown; kinds are query"),
        ("a.jsonl", b'{"text": "x", "kind": "query", "instruction": 5}', "line 1: instruction is not a string"),
        ("a.dat", b"x", "unknown format"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as error:
        calibration_texts.read(str(tmp_path / name), 288, 0)
    assert reason in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_parquet_errors(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(BadInput, match="not a Parquet file"):
        calibration_texts.read(str(tmp_path / "a.parquet"), 288, 0)
    write_parquet(tmp_path / "b.parquet", ROWS)
    with pytest.raises(BadInput, match=r"no column 'title'; choose with .*: text, body, kind"):
        calibration_texts.read(f"{tmp_path / 'b.parquet'}:title", 288, 0)
    write_parquet(tmp_path / "c.parquet", [*ROWS, {"text": None}])
    with pytest.raises(BadInput, match="row 201: the text is empty"):
        calibration_texts.read(str(tmp_path / "c.parquet"), 288, 0)


def test_parquet_without_pyarrow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install '?pyarrow"):
        calibration_texts.read(str(tmp_path / "a.parquet"), 288, 0)


def test_long_texts_are_cut_and_counted_unless_they_exceed_the_context(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    rows = [*ROWS[:70], {"text": "x" * 100}]
    write_txt(tmp_path / "a.txt", rows)
    calibration = prepare(calibration_texts.read(str(tmp_path / "a.txt"), 100, 0), checkpoint, max_tokens=50, check=32, seed=0)
    assert calibration.cut == 1
    assert len(calibration.rows[70]) == 50
    assert calibration.rows[70][-1] == calibration.rows[0][-1]
    write_txt(tmp_path / "a.txt", [*rows, {"text": "y" * 128}])
    with pytest.raises(BadInput, match=r"a\.txt, line 143: 129 tokens, the model's context is 128"):
        prepare(calibration_texts.read(str(tmp_path / "a.txt"), 100, 0), checkpoint, max_tokens=50, check=32, seed=0)


def test_quantize_with_the_users_texts(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    assert_refused(quantize("--model", source.folder, "--output", target, "--calibration", tmp_path / "no.txt"), "no such file")
    refused = quantize("--model", source.folder, "--output", target, "--delimiter", ";")
    assert_refused(refused, "--delimiter applies to CSV and TSV files")
    (tmp_path / "few.csv").write_bytes("t\ngr\xf6\xdfer\n".encode("latin-1"))
    few = ("--calibration", f"{tmp_path / 'few.csv'}:t")
    assert_refused(quantize("--model", source.folder, "--output", target, *few), "--encoding, such as cp1252")
    assert_refused(quantize("--model", source.folder, "--output", target, *few, "--encoding", "cp1252"), "1 texts, at least 64")
    (tmp_path / "few.txt").write_text("one\n")
    assert_refused(quantize("--model", source.folder, "--output", target, "--calibration", tmp_path / "few.txt"), "few.txt")
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    result = quantize("--model", source.folder, "--output", target, "--calibration", f"{tmp_path / 'a.jsonl'}:body", "--json")
    assert result.exit_code == 0, result.output
    recorded = json.loads((target / "qembed.json").read_text())["calibration"]
    assert recorded["source"] == "a.jsonl"
    assert recorded["texts"] == 64 - 10
    assert recorded == json.loads(result.stdout)["calibration"]
    assert str(tmp_path) not in (target / "qembed.json").read_text()


@pytest.mark.parametrize(("count", "held_out"), [(64, 10), (99, 11), (288, 32), (5000, 32)])
def test_one_text_in_nine_is_held_out(count: int, held_out: int) -> None:
    assert calibration_texts.held_out_count(count) == held_out
