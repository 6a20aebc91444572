"""What a run shows while it works, and in its last lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qembed.embed import spool
from qembed.embed.writer import Progressed

from .conftest import Embed


def test_speed_and_share_count_what_this_run_computed(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qembed.embed import windows, writer

    monkeypatch.setattr(windows, "ROWS", 100)
    told: list[Progressed] = []
    initial = writer.Writer.tell

    def tell(self: writer.Writer, tokens: int, rows: int, is_new: bool = True) -> None:
        self._on_progress = told.append
        initial(self, tokens, rows, is_new)

    monkeypatch.setattr(writer.Writer, "tell", tell)
    monkeypatch.setattr(
        spool.Spool, "begin", lambda _, window: {0: (np.zeros((64, 16), np.float32), {})} if window == 0 else {}
    )
    monkeypatch.setattr(spool.Spool, "put", lambda *_: None)
    (tmp_path / "in.txt").write_text("".join(f"text {n:03}\n" for n in range(200)))
    assert embed(tmp_path / "in.txt", "-o", tmp_path / "out.npy").exit_code == 0
    assert told[0].rows_per_second == 0
    assert told[0].done.vectors == 64
    assert told[-1].rows_per_second > 0
    shares = [each.fraction for each in told]
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
