"""Killed runs, full disks, changed inputs: finished work is kept, and the final output is byte-identical."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import tests.victims
from qembed.embed.job import Job
from qembed.embed.run import reporting_disk_errors
from qembed.errors import QembedError
from tests.victims import Victims

from .conftest import contents, start

pytestmark = pytest.mark.slow

ROWS = 100_000
SMALL = {"QEMBED_TEST_ROWS": "40", "QEMBED_TEST_SPOOL": "0"}


class Embedding(Victims):
    """Runs of `qembed embed` with the fake engine."""

    def embed(self, *arguments: object, kill: int = 0, number: int = signal.SIGKILL) -> dict[str, Any]:
        return self.run("embed", *arguments, kill=kill, number=number)


@contextmanager
def victims(*before: str) -> Iterator[Embedding]:
    with tests.victims.victims("tests.embed.victim", *before, environment=SMALL) as run:
        yield Embedding(run.process)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """230 texts, a few of them empty."""
    path = tmp_path / "in.txt"
    path.write_text("".join(f"{'word ' * (n % 7)}text {n}\n" if n % 50 else "\n" for n in range(230)))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".csv", ".jsonl"])
def test_after_a_kill_at_any_step_the_next_run_gives_the_same_bytes(source: Path, tmp_path: Path, suffix: str) -> None:
    whole, work = tmp_path / "whole", tmp_path / "work"
    whole.mkdir()
    with victims() as run:
        steps = run.embed(source, "-o", whole / f"out{suffix}")["steps"]
        expected_contents = contents(whole)
        assert len(expected_contents) == (3 if suffix == ".npy" else 2)
        assert len(steps) > 30
        # Every ninth step, and each of the last eight.
        moments = sorted({*range(1, len(steps), 9), *range(len(steps) - 8, len(steps) + 1)})
        for kill in moments:
            where = f"killed before step {kill} of {len(steps)}: {steps[kill - 1]}"
            work.mkdir()
            assert run.embed(source, "-o", work / f"out{suffix}", kill=kill)["code"] == -9, where
            if (work / f"out{suffix}").exists():
                assert {name: value for name, value in contents(work).items() if "partial" not in name} == expected_contents, (
                    where
                )
            again = run.embed(source, "-o", work / f"out{suffix}")
            assert again["code"] == 4, (where, again["stderr"])
            assert contents(work) == expected_contents, where
            shutil.rmtree(work)


def test_a_run_that_is_killed_repeatedly_still_finishes(source: Path, tmp_path: Path) -> None:
    whole, work = tmp_path / "whole", tmp_path / "work"
    whole.mkdir()
    work.mkdir()
    with victims() as run:
        assert run.embed(source, "-o", whole / "out.parquet", "--chunk-tokens", "4", "--txt", "lines")["code"] == 4
        code, runs = -9, 0
        while code == -9:
            code = run.embed(source, "-o", work / "out.parquet", "--chunk-tokens", "4", "--txt", "lines", kill=9)["code"]
            runs += 1
            assert runs < 100
        assert runs > 5
        assert code == 4
        assert contents(work) == contents(whole)


def test_ctrl_c_and_sigterm_report_how_to_resume(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out.npy"
    out.parent.mkdir()
    with victims() as run:
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            answer = run.embed(source, "-o", out, kill=12, number=number)
            assert answer["code"] == code
            assert f"interrupted; finished work is kept in {out.parent / '.out.npy.partial'}" in answer["stderr"]
            assert "Traceback" not in answer["stderr"]
        assert run.embed(source, "-o", out)["code"] == 4


def test_a_full_disk_and_a_read_only_one(source: Path, tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)]).returncode:
        pytest.skip("a file system of one's own needs unprivileged user namespaces (unshare -rm)")
    disk, saved, whole = tmp_path / "disk", tmp_path / "saved", tmp_path / "whole"
    disk.mkdir()
    whole.mkdir()
    with victims(*unshare) as run:
        for suffix, options in ((".npy", ()), (".parquet", ("--keep", "text"))):
            wide = ("--dimensions", "256", *options)
            assert run.embed(source, "-o", whole / f"out{suffix}", *wide)["code"] == 4
            assert run.ask(shell=f"mount -t tmpfs -o size=160k none {disk}")["code"] == 0
            full = run.embed(source, "-o", disk / f"out{suffix}", *wide)
            (line,) = [line for line in full["stderr"].splitlines() if line.startswith("qembed: ")]
            assert full["code"] == 1
            assert "the disk is full (No space left on device)" in line
            assert f"kept in {disk / f'.out{suffix}.partial'}: " in line
            assert "Traceback" not in full["stderr"]
            again = run.embed(source, "-o", disk / f"out{suffix}", *wide)
            assert again["code"] == 1  # the disk is still full: another try loses nothing
            assert run.ask(shell=f"mount -o remount,size=4m {disk}")["code"] == 0
            assert run.embed(source, "-o", disk / f"out{suffix}", *wide)["code"] == 4
            assert run.ask(shell=f"cp -r {disk} {saved}{suffix}")["code"] == 0
            assert contents(Path(f"{saved}{suffix}")) == {
                name: value for name, value in contents(whole).items() if suffix in name or "ids" in name or "rejects" in name
            }
            assert run.ask(shell=f"mount -o remount,ro {disk}")["code"] == 0
            refused = run.embed(source, "-o", disk / "other.npy")
            assert refused["code"] == 2
            assert "Read-only file system" in refused["stderr"]
            assert run.ask(shell=f"umount {disk}")["code"] == 0
            shutil.rmtree(whole)
            whole.mkdir()


def test_a_full_disk_is_reported_alike_for_every_library(tmp_path: Path) -> None:
    job = cast(Job, SimpleNamespace(partial=tmp_path))
    for message in ("No space left on device", "Error writing bytes to file. Detail: [errno 28] No space left on device"):
        with pytest.raises(QembedError) as error, reporting_disk_errors(job):
            raise OSError(errno.ENOSPC, message)
        assert f"{tmp_path}: the disk is full (No space left on device); finished work is kept in " in str(error.value)


def test_a_run_with_other_options_or_input_does_not_resume_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out.npy"
    out.parent.mkdir()
    with victims() as run:
        assert run.embed(source, "-o", out, kill=12)["code"] == -9
        refused = run.embed(source, "-o", out, "--prompt", "query")
        assert refused["code"] == 2
        assert "the interrupted run differs (prompt was" in refused["stderr"]
        text = source.read_text()
        source.write_text("another beginning\n" + text)
        changed = run.embed(source, "-o", out)
        assert changed["code"] == 2
        assert "the input has changed" in changed["stderr"]
        assert run.embed(source, "-o", out, "--prompt", "query", "--force")["code"] == 4
        assert not list(out.parent.glob(".*"))
        assert len(np.load(out)) == 226


def test_two_concurrent_runs_do_not_share_an_output(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    slow = start(source, "-o", out, delay=60, rows=40)  # killed below
    try:
        while not (tmp_path / ".out.npy.partial" / "journal.jsonl").exists():
            assert slow.poll() is None
            time.sleep(0.05)
        other = start(source, "-o", out)
        _, stderr = other.communicate(timeout=60)
        assert other.returncode == 1
        assert b"another qembed embed is writing there" in stderr
    finally:
        slow.kill()
        slow.communicate()


def test_finished_batches_of_an_interrupted_window_are_not_computed_again(source: Path, tmp_path: Path) -> None:
    """One window, computed slowly: its finished batches survive the kill."""
    source.write_text("".join(f"{'word ' * 40}text {n}\n" for n in range(200)))
    out = tmp_path / "out.npy"
    slow = start(source, "-o", out, delay=0.2, spool=0)
    batches = tmp_path / ".out.npy.partial" / "batches-0"
    while not batches.exists() or batches.stat().st_size < 3000:
        assert slow.poll() is None, slow.communicate()
        time.sleep(0.02)
    slow.kill()
    slow.communicate()
    before = batches.stat().st_size
    with batches.open("r+b") as file:  # the last batch is incomplete
        file.truncate(before - 7)
    second = start(source, "-o", out, delay=0.2, spool=0)
    while batches.stat().st_size == before - 7:
        assert second.poll() is None
        time.sleep(0.01)
    second.kill()
    second.communicate()
    assert batches.stat().st_size > 2000
    assert start(source, "-o", out).wait(60) == 0
    result = start(source, "-o", tmp_path / "whole.npy")
    assert result.wait(60) == 0
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_hundred_thousand_rows_with_a_kill_in_the_middle_and_bounded_memory(tmp_path: Path) -> None:
    source, small = tmp_path / "in.txt", tmp_path / "small.txt"
    with source.open("wb") as file:
        for n in range(ROWS):
            file.write(b"\n" if n % 9973 == 5 else b"text %d%s\n" % (n, b" word" * (n % 5)))
    small.write_bytes(b"".join(source.open("rb").readlines()[:10_000]))
    whole, work = tmp_path / "whole", tmp_path / "work"
    whole.mkdir()
    work.mkdir()
    peaks = {}
    for name, path in (("small", small), ("whole", source)):
        out = whole / "out.parquet" if name == "whole" else tmp_path / "small.parquet"
        run = start(path, "-o", out, "--json", peak=tmp_path / "peak")
        printed, stderr = run.communicate(timeout=600)
        assert run.returncode == 4, stderr
        peaks[name] = int((tmp_path / "peak").read_text())
    assert json.loads(printed)["vectors"] + json.loads(printed)["rejected"] == json.loads(printed)["rows"] == ROWS
    # Ten times the rows: only the list of windows may grow, not their content.
    assert peaks["whole"] < peaks["small"] + 40_000, peaks

    killed = start(source, "-o", work / "out.parquet")
    journal = work / ".out.parquet.partial" / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b'"done"') < 12:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -9
    again = start(source, "-o", work / "out.parquet", "--json")
    printed, stderr = again.communicate(timeout=600)
    assert again.returncode == 4, stderr
    assert 40_000 < json.loads(printed)["resumed"] < ROWS
    assert contents(work) == contents(whole)
