"""A run that is broken off, and the one that goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qembed.quantize import parts
from qembed.quantize.layer import LayerQuantizer

from .conftest import MakeCheckpoint, contents, quantize

pytestmark = pytest.mark.slow


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def on_call(number: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`function`, but its call with this number (from 1) raises `error` instead."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("options", [(), ("--scales", "none", "--no-clip", "--rounding", "rtn")])
def test_a_resumed_run_ends_with_the_same_bytes_and_makes_no_finished_layer_again(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    source, target = make_checkpoint("llama", attention_bias=True, num_hidden_layers=3), tmp_path / "out"
    whole = quantize("--model", source.folder, "--output", tmp_path / "whole", "--json", *options)
    assert whole.exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(parts.Parts, "write", on_call(4, parts.Parts.write, KeyboardInterrupt()))
        result = quantize("--model", source.folder, "--output", target, *options)
    assert result.exit_code == 130
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("qembed: ")]
    assert "2 finished layers are kept" in line
    assert "--resume" in line
    assert not target.exists()
    made: list[int] = []
    with monkeypatch.context() as patched:
        again = LayerQuantizer.run
        patched.setattr(LayerQuantizer, "run", lambda *arguments: (made.append(1), again(*arguments))[1])
        resumed = quantize("--model", source.folder, "--output", target, "--resume", "--json", *options)
    assert len(made) == 1
    changing = {"output": None, "seconds": None}
    assert json.loads(resumed.stdout) | changing == json.loads(whole.stdout) | changing
    assert contents(target) == contents(tmp_path / "whole")
    assert hidden(tmp_path) == []


def test_only_the_same_run_is_resumed(make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(parts.Parts, "write", on_call(3, parts.Parts.write, OSError(28, "No space left on device")))
        result = quantize("--model", source.folder, "--output", target)
    assert result.exit_code == 1
    assert "No space left on device; 1 finished layer is kept" in result.stderr
    before = contents(tmp_path / ".out.partial")
    for options, reason in (
        (("--seed", "1"), "seed was 0, is 1"),
        (("--no-clip",), "clip was True, is False"),
        (("--group-size", "32"), "group_size was 64, is 32"),
    ):
        result = quantize("--model", source.folder, "--output", target, "--resume", *options)
        assert result.exit_code == 2
        assert reason in result.stderr
        assert contents(tmp_path / ".out.partial") == before
    config = source.folder / "config.json"
    config.write_text(config.read_text() + " ")
    result = quantize("--model", source.folder, "--output", target, "--resume")
    assert result.exit_code == 2
    assert "config.json has changed" in result.stderr
    assert contents(tmp_path / ".out.partial") == before
    assert quantize("--model", source.folder, "--output", target).exit_code == 0
    assert hidden(tmp_path) == []


def test_nothing_to_resume_just_starts(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    assert quantize("--model", source.folder, "--output", tmp_path / "out", "--resume").exit_code == 0
    assert hidden(tmp_path) == []
