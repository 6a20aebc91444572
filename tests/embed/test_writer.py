"""Progress reported by the writer, and rows that it rejects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qembed.embed import spool
from qembed.embed.writer import Progress

from .conftest import Embed, ids, rejects
from .fake_engine import SPOILT


def test_speed_and_progress_count_only_this_runs_vectors(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert reports[0].totals.vectors == 64
    assert reports[-1].rows_per_second > 0
    shares = [progress.fraction for progress in reports]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 1
    assert shares[-1] == 1


def test_a_vector_that_is_not_finite_is_a_rejected_row(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(f"fine\n{SPOILT}\nfine too\n")
    assert embed(tmp_path / "in.txt", "-o", tmp_path / "out.npy").exit_code == 4
    assert ids(tmp_path / "out.npy") == ["1", "3"]
    (reject,) = rejects(tmp_path / "out.rejects.jsonl")
    assert reject == {"id": "2", "place": "in.txt, line 2", "reason": "its vector holds NaN or infinity", "text": SPOILT}
    assert embed(tmp_path / "in.txt", "-o", tmp_path / "strict.npy", "--strict").exit_code == 2
