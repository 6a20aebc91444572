"""What a run shows while it works, and in its last lines."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qembed.command import progress
from qembed.embed import spool
from qembed.embed.writer import Progress

from .conftest import Embed


def test_without_a_terminal_there_are_lines_and_no_spinner(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with progress.reporter("reading", Console(file=out)) as shown:
        shown.update("embedding", 0.25, "10 vectors")
        assert out.getvalue() == ""
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        shown.update(fraction=0.5)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("embedding: 50%, 10 vectors, ")


def test_on_a_terminal_the_bar_has_a_share_and_leaves_stderr_to_the_log() -> None:
    out, stderr = io.StringIO(), sys.stderr
    with progress.reporter("reading", Console(file=out, force_terminal=True, width=120)) as shown:
        shown.update("embedding", 0.5, "10 vectors")
        assert sys.stderr is stderr
    assert "50%" in out.getvalue()
    assert "10 vectors" in out.getvalue()


def test_speed_and_share_count_what_this_run_computed(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qembed.embed import windows, writer

    monkeypatch.setattr(windows, "ROWS", 100)
    reports: list[Progress] = []
    original = writer.Writer.report

    def report(self: writer.Writer, tokens: int, rows: int, is_new: bool = True) -> None:
        self._on_progress = reports.append
        original(self, tokens, rows, is_new)

    monkeypatch.setattr(writer.Writer, "report", report)
    monkeypatch.setattr(
        spool.Spool, "begin", lambda _, window: {0: (np.zeros((64, 16), np.float32), {})} if window == 0 else {}
    )
    monkeypatch.setattr(spool.Spool, "put", lambda *_, **__: None)
    (tmp_path / "in.txt").write_text("".join(f"text {n:03}\n" for n in range(200)))
    assert embed(tmp_path / "in.txt", "-o", tmp_path / "out.npy").exit_code == 0
    assert reports[0].rows_per_second == 0
    assert reports[0].done.vectors == 64
    assert reports[-1].rows_per_second > 0
    shares = [progress.fraction for progress in reports]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 1
    assert shares[-1] == 1


def test_the_last_lines_name_what_to_do_and_count_in_words(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": ""}\n')
    (tmp_path / "none.txt").write_text("\n \n")
    done = embed(tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet")
    assert f"next: qembed index {tmp_path / 'out.parquet'} -o {tmp_path / 'out.faiss'}" in done.stderr
    assert "1 row was rejected" in done.stderr
    assert "1 vector of 16" in done.stdout
    empty = embed(tmp_path / "none.txt", "-o", tmp_path / "none.parquet")
    assert empty.exit_code == 4
    assert "2 rows were rejected" in empty.stderr
    assert "none.parquet holds no vector" in empty.stderr
    assert "next:" not in empty.stderr
    printed = embed(tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet", "--force", "--json")
    assert json.loads(printed.stdout)["vectors"] == 1
    assert "next:" not in printed.stderr


def test_a_refusal_is_one_line_alone(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "out.npy").touch()
    done = embed(tmp_path / "in.txt", "-o", tmp_path / "out.npy")
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("qembed: ")]
