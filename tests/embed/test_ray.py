"""On a real local Ray: two workers, one of them killed; the parts together are what one machine makes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qembed.serve import ports

from .conftest import rejects, started

pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ON_RAY = ("--ray", "local", "--ray-workers", "2", "--ray-cpus", "1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of rows, some of them empty."""
    folder = tmp_path_factory.mktemp("ray") / "in"
    folder.mkdir()
    for file in range(3):
        lines = [f"{'word ' * (n % 7)}text {n} of {file}" if n % 90 else "" for n in range(700 - 300 * file)]
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> pyarrow.Table:
    """What one machine makes of them."""
    out = source.with_name("whole.parquet")
    assert started(source, "-o", out, "--keep", "text").wait(120) == 4
    return pyarrow.parquet.read_table(out)


def ended(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 4, err.decode()
    said: dict[str, Any] = json.loads(out)
    return said


def check(out: Path, whole: pyarrow.Table, source: Path) -> None:
    """The parts in the order of their names are the whole, and the manifest says so."""
    parts = sorted(out.glob("part-*.parquet"))
    table = pyarrow.concat_tables(map(pyarrow.parquet.read_table, parts))
    assert table.column_names == whole.column_names
    assert table["id"].to_pylist() == whole["id"].to_pylist()
    assert table["vector"].to_pylist() == whole["vector"].to_pylist()
    manifest = json.loads((out / "manifest.json").read_text())
    assert [part["file"] for part in manifest["parts"]] == [path.name for path in parts]
    assert [part["sha256"] for part in manifest["parts"]] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in parts]
    assert manifest["vectors"] == table.num_rows == sum(part["vectors"] for part in manifest["parts"])
    assert [one["id"] for one in rejects(out / "rejects.jsonl")] == [
        one["id"] for one in rejects(source.with_name("whole.rejects.jsonl"))
    ]
    assert not list(out.parent.glob(f".{out.name}*"))
    assert not list(out.glob(".*"))


def test_a_killed_worker_costs_its_batch_and_not_the_job(source: Path, whole: pyarrow.Table, tmp_path: Path) -> None:
    out, pids = tmp_path / "out.parquet", tmp_path / "pids"
    pids.mkdir()
    job = started(source, "-o", out, "--keep", "text", "--json", *ON_RAY, rows=50, delay=0.3, pids=pids)
    records = tmp_path / ".out.parquet.partial" / "records"
    while len(list(pids.iterdir())) < 2 or not list(records.glob("part-*.json")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    before = {int(path.name) for path in pids.iterdir()}
    os.kill(min(before), signal.SIGKILL)
    said = ended(job)
    assert said["parts"] > 20
    after = {int(path.name) for path in pids.iterdir()}
    assert len(after) > len(before)  # another took its place
    check(out, whole, source)


def test_a_job_that_is_killed_goes_on_from_its_parts(source: Path, whole: pyarrow.Table, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    job = started(source, "-o", out, "--keep", "text", "--json", *ON_RAY, rows=50, delay=0.3)
    records = tmp_path / ".out.parquet.partial" / "records"
    while len(list(records.glob("part-*.json"))) < 4:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.kill()
    job.communicate()
    assert not out.exists()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.parquet.partial" / "parts").glob("part-*.parquet")}
    ended(started(source, "-o", out, "--keep", "text", "--json", *ON_RAY, rows=50))
    check(out, whole, source)
    assert all((out / name).stat().st_mtime_ns == time for name, time in done.items())


def test_an_address_without_a_cluster_is_told_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{ports.free('127.0.0.1')}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    for given in (address, f"ray://{address}", "auto"):
        process = started(source, "-o", tmp_path / "out.parquet", "--ray", given)
        _, err = process.communicate(timeout=60)  # Ray itself tries for a quarter of an hour
        assert process.returncode == 1
        assert f"qembed: --ray {given}: no Ray cluster there ({address if given == 'auto' else given}: ".encode() in err
    assert not list(tmp_path.iterdir())


def test_a_token_that_is_not_there_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = started(source, "-o", tmp_path / "out.parquet", "--ray", f"127.0.0.1:{listening.getsockname()[1]}")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"no Ray cluster there (Token authentication is enabled but no authentication token was found" in err


def test_bad_input_is_told_as_without_ray(source: Path, tmp_path: Path) -> None:
    for options, words in (
        (("-o", tmp_path / "out.npy", "--ray", "local"), b"--ray writes a folder of Parquet files"),
        (("-o", tmp_path / "out.parquet", "--ray-workers", "2"), b"go with --ray"),
        (("-o", tmp_path / "out.parquet", "--strict", *ON_RAY), b".txt, line 1: empty (--strict)"),
    ):
        process = started(source, *options)
        _, err = process.communicate(timeout=120)
        assert process.returncode in (1, 2), err
        assert words in err
