"""The progress display of all long commands."""

from __future__ import annotations

import io
import sys
import time

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


def test_lines_go_on_while_a_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    out = io.StringIO()
    with progress.reporter("reading", Console(file=out)) as shown:
        shown.steps("layers", 0, 28)
        while out.getvalue().count("layers: 0%, 0 of 28, ") < 2:
            time.sleep(0.01)
    lines = out.getvalue()
    time.sleep(0.05)
    assert out.getvalue() == lines


def test_a_new_stage_shows_nothing_of_the_one_before() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress.reporter("reading", console) as shown:
        assert isinstance(shown, progress.BarReporter)
        shown.steps("checking tensors", 68, 68)
        shown.steps("layers", 0, 28)
        (task,) = shown.bar.tasks
        assert (task.description, task.percentage, task.fields["detail"]) == ("layers", 0, "0 of 28")
        assert task.time_remaining is None
        shown.stage("writing")
        (task,) = shown.bar.tasks
        assert (task.description, task.total, task.fields["detail"]) == ("writing", None, "")
