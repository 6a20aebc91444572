"""The last lines of a run: its result, rejected rows, and the next command."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Embed


def test_the_last_lines_report_counts_and_the_next_command(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": ""}\n')
    (tmp_path / "none.txt").write_text("\n \n")
    result = embed(tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet")
    assert f"next: qembed index {tmp_path / 'out.parquet'} -o {tmp_path / 'out.faiss'}" in result.stderr
    assert "1 row was rejected" in result.stderr
    assert "1 vector of 16" in result.stdout
    empty = embed(tmp_path / "none.txt", "-o", tmp_path / "none.parquet")
    assert empty.exit_code == 4
    assert "2 rows were rejected" in empty.stderr
    assert "none.parquet holds no vector" in empty.stderr
    assert "next:" not in empty.stderr
    printed = embed(tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet", "--force", "--json")
    assert json.loads(printed.stdout)["vectors"] == 1
    assert "next:" not in printed.stderr


def test_refused_input_is_reported_in_one_line(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "out.npy").touch()
    result = embed(tmp_path / "in.txt", "-o", tmp_path / "out.npy")
    assert result.stderr.splitlines() == [line for line in result.stderr.splitlines() if line.startswith("qembed: ")]


def test_ids_that_name_several_rows_are_told(embed: Embed, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        '{"id": "a", "text": "1"}\n{"id": "b", "text": "2"}\n{"id": "a", "text": "3"}\n{"text": "4"}\n'
    )
    (folder / "b.csv").write_text("id,text\nb,5\nc,6\nc,7\n")
    result = embed(folder, "-o", tmp_path / "out.jsonl")
    assert "3 ids name more than one row" in result.stderr
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        *("a", "b", "a", "a.jsonl:4", "b", "c", "c")
    ]
    (folder / "b.csv").write_text("id,text\nb,5\nc,6\n")
    (folder / "a.jsonl").unlink()
    assert "more than one row" not in embed(folder, "-o", tmp_path / "unique.jsonl").stderr
