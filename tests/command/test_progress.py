"""The progress of a command, on a terminal and without one."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from qembed.command import progress


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
