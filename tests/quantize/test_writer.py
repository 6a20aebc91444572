"""The output folder: replaced only by a complete checkpoint; interrupted runs resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qembed.quantize import layerwise, parts, writer
from qembed.quantize.layer import LayerQuantizer
from tests.checkpoints import MakeCheckpoint

from .conftest import assert_refused, contents, quantize

pytestmark = pytest.mark.slow


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def on_call(number: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`function`, except that call number `number` (from 1) raises `error`."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("options", [(), ("--scales", "none", "--no-clip", "--rounding", "rtn")])
def test_resumed_run_is_byte_identical_and_skips_finished_layers(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    source, target = make_checkpoint("llama", attention_bias=True, num_hidden_layers=3), tmp_path / "out"
    uninterrupted = quantize("--model", source.folder, "--output", tmp_path / "uninterrupted", "--json", *options)
    assert uninterrupted.exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(parts.Parts, "write", on_call(4, parts.Parts.write, KeyboardInterrupt()))
        result = quantize("--model", source.folder, "--output", target, *options)
    assert result.exit_code == 130
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("qembed: ")]
    assert "2 finished layers are kept" in line
    assert "--resume" in line
    assert not target.exists()
    quantized: list[int] = []
    with monkeypatch.context() as patched:
        original_run = LayerQuantizer.run
        patched.setattr(LayerQuantizer, "run", lambda *arguments: (quantized.append(1), original_run(*arguments))[1])
        resumed = quantize("--model", source.folder, "--output", target, "--resume", "--json", *options)
    assert len(quantized) == 1
    ignored = {"output": None, "seconds": None}
    assert json.loads(resumed.stdout) | ignored == json.loads(uninterrupted.stdout) | ignored
    assert contents(target) == contents(tmp_path / "uninterrupted")
    assert hidden(tmp_path) == []


def test_resume_requires_the_same_options_and_source(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_resume_without_an_interrupted_run_starts_a_new_one(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    assert quantize("--model", source.folder, "--output", tmp_path / "out", "--resume").exit_code == 0
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(("former", "current"), [("compensated", "gptq"), ("nearest", "rtn")])
def test_former_rounding_names_are_accepted_and_resumed(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: str, current: str
) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(parts.Parts, "write", on_call(3, parts.Parts.write, KeyboardInterrupt()))
        assert quantize("--model", source.folder, "--output", target, "--rounding", former).exit_code == 130
    fingerprint = tmp_path / ".out.partial" / writer.FINGERPRINT
    recorded = json.loads(fingerprint.read_text())
    assert recorded["rounding"] == current
    fingerprint.write_text(json.dumps({**recorded, "rounding": former}))
    result = quantize("--model", source.folder, "--output", target, "--resume", "--rounding", current)
    assert result.exit_code == 0, result.output
    assert json.loads((target / "qembed.json").read_text())["settings"]["rounding"] == current


def test_rope_theta_is_written_for_transformers_4_and_5() -> None:
    for config in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}):
        int4 = writer.int4_config(config, 128)
        assert int4["rope_theta"] == 5e5
        assert int4["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}


def test_existing_target_is_refused_and_unchanged(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("precious")
    assert_refused(quantize("--model", source.folder, "--output", target), "exists already", "--force")
    assert_refused(quantize("--model", source.folder, "--output", target, "--force"), "not written by qembed")
    assert contents(target).keys() == {"notes.txt"}
    assert_refused(quantize("--model", source.folder, "--output", source.folder, "--force"), "is the input")


def test_force_replaces_the_target_only_after_success(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    assert quantize("--model", source.folder, "--output", target).exit_code == 0
    before = contents(target)
    with monkeypatch.context() as patched:
        disk_full = OSError(28, "No space left on device")
        patched.setattr(layerwise.LayerQuantizer, "run", lambda *_: (_ for _ in ()).throw(disk_full))
        result = quantize("--model", source.folder, "--output", target, "--force")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert contents(target) == before
    assert not list(tmp_path.glob(".*"))
    assert quantize("--model", source.folder, "--output", target, "--force", "--seed", "5").exit_code == 0
    assert contents(target) != before
    assert not list(tmp_path.glob(".*"))


def test_leftovers_of_a_killed_run_are_deleted_unless_locked(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    import fcntl

    source, target = make_checkpoint(), tmp_path / "out"
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "part-layer-999.safetensors").write_bytes(b"left by a killed run")
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(quantize("--model", source.folder, "--output", target), "another qembed quantize")
        assert (partial / "part-layer-999.safetensors").exists()
    assert quantize("--model", source.folder, "--output", target).exit_code == 0
    assert not partial.exists()
    assert {path.name for path in target.glob("*.safetensors")} == {"model.safetensors"}


def test_target_is_restored_after_a_kill_between_the_two_renames(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    assert quantize("--model", source.folder, "--output", target).exit_code == 0
    before = contents(target)
    target.rename(tmp_path / ".out.replaced")
    assert_refused(quantize("--model", source.folder, "--output", target), "exists already")
    assert contents(target) == before


@pytest.mark.skipif(os.geteuid() != 0 and not os.access("/proc", os.R_OK), reason="needs /proc, where nobody can write")
def test_unwritable_target(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    assert_refused(quantize("--model", source.folder, "--output", "/proc/out"), "/proc", "cannot be written")
    assert_refused(quantize("--model", source.folder, "--output", tmp_path / "no" / "such"), "no such folder")


def test_a_working_folder_behind_a_link_is_not_used(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, other = make_checkpoint(), tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("mine")
    (tmp_path / ".out.partial").symlink_to(other)
    result = quantize("--model", source.folder, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert ".out.partial" in result.stderr
    assert [path.name for path in other.iterdir()] == ["precious"]
