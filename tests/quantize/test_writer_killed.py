"""SIGKILL at every kind of step, a full disk, a read-only disk; with real processes on a real file system."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tests.victims
from tests.checkpoints import FAMILY_SIZES, MakeCheckpoint
from tests.victims import Victims

from .conftest import contents

pytestmark = pytest.mark.slow

QUICK = ("--group-size", "64", "--calibration-texts", "64", "--max-tokens", "16", "--rounding", "rtn", "--no-clip")
QUICK += ("--scales", "none", "--threads", "1")


class Quantizing(Victims):
    """Runs `qembed quantize` with fast settings."""

    def quantize(
        self, source: Path, target: Path, *options: str, kill: int | str = 0, number: int = signal.SIGKILL
    ) -> dict[str, Any]:
        return self.run("quantize", "--model", source, "--output", target, *QUICK, *options, kill=kill, number=number)


@contextmanager
def victims(*before: str) -> Iterator[Quantizing]:
    with tests.victims.victims("tests.quantize.victim", *before, environment={"OMP_NUM_THREADS": "1"}) as run:
        yield Quantizing(run.process)


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(".*")}


def kill_points(steps: list[str]) -> list[int]:
    """The first and last step of each kind, the step that completes the checkpoint, and the steps around the final renames."""
    kinds: dict[str, list[int]] = {}
    for number, step in enumerate(steps, 1):
        verb, _, name = step.partition(" ")
        kinds.setdefault(f"{verb} {'' if verb == 'fsync' else name}", []).append(number)
    complete = max(number for number, step in enumerate(steps, 1) if step == "replace config.json.tmp")
    return sorted({point for numbers in kinds.values() for point in (numbers[0], numbers[-1])} | {complete, *renames(steps)})


def renames(steps: list[str]) -> set[int]:
    """The renames that replace the old checkpoint by the new one, and the step after each."""
    numbers = [number for number, step in enumerate(steps, 1) if step.startswith("rename ")]
    return {point for number in numbers for point in (number, number + 1) if point <= len(steps)}


def test_kill_at_any_step_leaves_the_old_or_the_new_checkpoint_and_the_next_run_works(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, target, work = make_checkpoint().folder, tmp_path / "work" / "out", tmp_path / "work"
    for name in ("work", "new", "old"):
        (tmp_path / name).mkdir()
    with victims() as run:
        assert run.quantize(source, tmp_path / "new" / "out")["code"] == 0
        assert run.quantize(source, tmp_path / "old" / "out", "--seed", "7")["code"] == 0
        new, old = contents(tmp_path / "new" / "out"), contents(tmp_path / "old" / "out")
        assert new != old
        assert len([name for name in new if name.endswith(".safetensors")]) > 1
        shutil.copytree(tmp_path / "old" / "out", target)
        steps = run.quantize(source, target, "--force")["steps"]
        assert contents(target) == new
        assert hidden(work) == set()
        points = kill_points(steps)
        assert len(points) > 15
        for number, kill in enumerate(points):
            where = f"killed before step {kill}: {steps[kill - 1]}"
            shutil.rmtree(target)
            shutil.copytree(tmp_path / "old" / "out", target)
            assert run.quantize(source, target, "--force", kill=kill)["code"] == -9, where
            replaced = work / ".out.replaced"
            present = contents(target if target.exists() else replaced)
            assert present in ([old, new] if target.exists() else [old]), where
            assert hidden(work) <= {".out.partial", ".out.replaced"}, where
            again = run.quantize(source, target, "--force", *(() if number % 3 == 0 else ("--resume",)))
            assert again["code"] == 0, (where, again["stderr"])
            assert contents(target) == new, where
            assert hidden(work) == set(), where


def test_kill_during_the_first_run_leaves_no_target_and_resume_completes_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, target, complete = make_checkpoint().folder, tmp_path / "work" / "out", tmp_path / "complete" / "out"
    target.parent.mkdir()
    complete.parent.mkdir()
    with victims() as run:
        assert run.quantize(source, complete)["code"] == 0
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            answer = run.quantize(source, target, kill="replace part-layer-000.safetensors.tmp", number=number)
            assert answer["code"] == code
            assert "interrupted; nothing was kept" in answer["stderr"]
            assert not list(target.parent.iterdir())
            answer = run.quantize(source, target, kill="replace part-layer-001.safetensors.tmp", number=number)
            assert answer["code"] == code
            assert "interrupted; 1 finished layer is kept" in answer["stderr"]
            assert "--resume" in answer["stderr"]
            assert "Traceback" not in answer["stderr"]
        for kill in ("replace part-layer-001.safetensors.tmp", "rename checkpoint"):
            answer = run.quantize(source, target, "--resume", kill=kill)
            assert answer["code"] == -9
            assert not target.exists()
        resumed = run.quantize(source, target, "--resume")
        assert resumed["code"] == 0
        assert not any("part-layer" in step and step.startswith("replace") for step in resumed["steps"])
        assert contents(target) == contents(complete)
        assert hidden(target.parent) == set()


def test_full_disk_and_read_only_disk(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)]).returncode:
        pytest.skip("mounting a file system needs unprivileged user namespaces (unshare -rm)")
    source = make_checkpoint().folder
    disk, saved, complete = tmp_path / "disk", tmp_path / "saved", tmp_path / "complete" / "out"
    disk.mkdir()
    complete.parent.mkdir()
    with victims(*unshare) as run:
        assert run.quantize(source, complete)["code"] == 0
        table = FAMILY_SIZES["vocab_size"] * FAMILY_SIZES["hidden_size"] * 2
        layer = (sum(path.stat().st_size for path in complete.glob("*.safetensors")) - table) // 2
        room = (table + layer * 3 // 2) // 4096 * 4096 + 4 * 4096
        assert run.ask(shell=f"mount -t tmpfs -o size={room} none {disk}")["code"] == 0
        full = run.quantize(source, disk / "out")
        (line,) = [line for line in full["stderr"].splitlines() if line.startswith("qembed: ")]
        assert full["code"] == 1
        assert "No space left on device" in line
        assert "1 finished layer is kept" in line
        assert "--resume" in line
        assert run.ask(shell=f"test ! -e {disk}/out && ls -A {disk} | grep -qx .out.partial")["code"] == 0
        assert run.ask(shell=f"mount -o remount,size={room * 4} {disk}")["code"] == 0
        assert run.quantize(source, disk / "out", "--resume")["code"] == 0
        assert run.ask(shell=f"cp -r {disk}/out {saved} && test -z \"$(ls -A {disk} | grep -v '^out$')\"")["code"] == 0
        assert contents(saved) == contents(complete)
        assert run.ask(shell=f"mount -o remount,ro {disk}")["code"] == 0
        for options in ((), ("--force",)):
            answer = run.quantize(source, disk / ("out" if options else "other"), *options)
            assert answer["code"] == 2
            assert "Read-only file system" in answer["stderr"]
            assert answer["stderr"].count("\n") == 1
