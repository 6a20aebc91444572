"""A real local Ray: workers and nodes are killed, and the output is that of one machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qembed.embed import job_options, ray_cluster, ray_pipeline, windows
from qembed.embed.ray_cluster import Share
from qembed.embed.suspects import CRASHED

from .conftest import Embed, rejects, start
from .fake_engine import CRASH, computing

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
def single_machine(source: Path) -> pyarrow.Table:
    """The output of one machine."""
    out = source.with_name("whole.parquet")
    assert start(source, "-o", out, "--keep", "text").wait(120) == 4
    return pyarrow.parquet.read_table(out)


def summary_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 4, err.decode()
    summary: dict[str, Any] = json.loads(out)
    return summary


def until(job: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Wait for `reached` while the job runs."""
    while not reached():
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)


def parts_in(records: Path) -> int:
    return len(list(records.glob("part-*.json")))


def check(out: Path, single_machine: pyarrow.Table, source: Path) -> None:
    """The parts, sorted by name, equal the output of one machine, and the manifest describes them."""
    parts = sorted(out.glob("part-*.parquet"))
    table = pyarrow.concat_tables(map(pyarrow.parquet.read_table, parts))
    assert table.column_names == single_machine.column_names
    assert table["id"].to_pylist() == single_machine["id"].to_pylist()
    assert table["vector"].to_pylist() == single_machine["vector"].to_pylist()
    manifest = json.loads((out / "manifest.json").read_text())
    assert [part["file"] for part in manifest["parts"]] == [path.name for path in parts]
    assert [part["sha256"] for part in manifest["parts"]] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in parts]
    assert manifest["vectors"] == table.num_rows == sum(part["vectors"] for part in manifest["parts"])
    assert [reject["id"] for reject in rejects(out / "rejects.jsonl")] == [
        reject["id"] for reject in rejects(source.with_name("whole.rejects.jsonl"))
    ]
    assert not list(out.parent.glob(f".{out.name}*"))
    assert not list(out.glob(".*"))


def test_a_killed_worker_costs_its_batch_and_not_the_job(source: Path, single_machine: pyarrow.Table, tmp_path: Path) -> None:
    out, pids = tmp_path / "out.parquet", tmp_path / "pids"
    pids.mkdir()
    job = start(source, "-o", out, "--keep", "text", "--json", *ON_RAY, rows=50, delay=0.3, pids=pids)
    records = tmp_path / ".out.parquet.partial" / "records"
    until(job, lambda: len(list(pids.iterdir())) >= 2 and parts_in(records) > 0)
    before = {int(path.name) for path in pids.iterdir()}
    os.kill(min(before), signal.SIGKILL)
    summary = summary_of(job)
    assert summary["parts"] > 20
    after = {int(path.name) for path in pids.iterdir()}
    assert len(after) > len(before)  # Ray started another actor
    check(out, single_machine, source)


def test_a_text_that_ends_its_actor_twice_is_rejected_and_the_job_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.parquet"
    source.write_text("".join(f"{CRASH if n == 60 else f'text {n}'}\n" for n in range(120)))
    summary_of(start(source, "-o", out, "--json", *ON_RAY, rows=50))
    assert [(reject["id"], reject["reason"]) for reject in rejects(out / "rejects.jsonl")] == [("61", CRASHED)]
    assert sum(pyarrow.parquet.read_table(part).num_rows for part in out.glob("part-*")) == 119
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("part-")) == [
        "manifest.json", "rejects.jsonl",
    ]  # fmt: skip


def test_a_killed_job_resumes_from_its_parts(source: Path, single_machine: pyarrow.Table, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    job = start(source, "-o", out, "--keep", "text", "--json", *ON_RAY, rows=50, delay=0.3)
    records = tmp_path / ".out.parquet.partial" / "records"
    until(job, lambda: parts_in(records) >= 4)
    job.kill()
    job.communicate()
    assert not out.exists()
    modification_times = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.parquet.partial" / "parts").glob("part-*.parquet")
    }
    summary_of(start(source, "-o", out, "--keep", "text", "--json", *ON_RAY, rows=50))
    check(out, single_machine, source)
    assert all((out / name).stat().st_mtime_ns == time for name, time in modification_times.items())


def test_a_killed_node_costs_its_batches_and_not_the_job(
    source: Path, single_machine: pyarrow.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("QEMBED_TEST_DELAY", "0.3")  # inherited by the nodes' actors
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost_node = nodes.add_node(num_cpus=1)
        out = tmp_path / "out.parquet"
        share = ("--ray", nodes.address, "--ray-workers", "2", "--ray-cpus", "1")
        job = start(source, "-o", out, "--keep", "text", "--json", *share, rows=50)
        records = tmp_path / ".out.parquet.partial" / "records"
        until(job, lambda: parts_in(records) >= 4)
        nodes.remove_node(lost_node, allow_graceful=False)
        summary_of(job)
    finally:
        nodes.shutdown()
    check(out, single_machine, source)


Parts = Callable[[ray_pipeline.Work, Share, frozenset[str]], Iterator[dict[str, Any]]]


def pipeline(attempts: list[int], fate: Callable[[int, int], str]) -> Parts:
    """A fake pipeline. `fate` of a file's window: "window" loses it, "end" loses it and the rest of its file, "" keeps it."""

    def parts(work: ray_pipeline.Work, _: Share, finished: frozenset[str]) -> Iterator[dict[str, Any]]:
        attempts.append(0)
        actor = ray_pipeline.Embedder(work)
        for file in range(len(work.job.inputs.files)):
            for number, row in enumerate(ray_pipeline._read({"file": [file]}, work, finished)):
                fate_of_window = fate(file, number)
                if fate_of_window == "end":
                    break
                if fate_of_window != "window":
                    yield part_of(actor, row)
                    attempts[-1] += 1

    return parts


def part_of(actor: ray_pipeline.Embedder, row: dict[str, list[Any]]) -> dict[str, Any]:
    return {name: value for name, (value,) in actor(row).items()}


def failing_after(after: int, attempts: list[int]) -> Parts:
    """A fake pipeline that fails each time after `after` parts."""

    def fate(_: int, __: int) -> str:
        if attempts[-1] == after:
            raise AssertionError("a node is gone")
        return ""

    return pipeline(attempts, fate)


def losing(loss: str, attempts: list[int]) -> Parts:
    """A fake pipeline that in its first attempt silently loses a window, or the end of a file."""
    return pipeline(attempts, lambda *window: loss if len(attempts) == 1 and window == (1, 3) else "")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[Parts], None]:
    """Replaces the pipeline of `embed … --ray local`."""
    monkeypatch.setattr(job_options, "_on_cluster", computing)
    monkeypatch.setattr(ray_cluster, "connected", lambda _: nullcontext())
    monkeypatch.setattr(windows, "ROWS", 50)
    return lambda parts: monkeypatch.setattr(ray_pipeline, "_parts", parts)


@pytest.mark.parametrize("after", [0, 7])
def test_failures_that_ray_cannot_repair_restart_the_pipeline_while_there_is_progress(
    after: int, embed: Embed, source: Path, single_machine: pyarrow.Table, tmp_path: Path, without_ray: Callable[[Parts], None]
) -> None:
    attempts: list[int] = []
    without_ray(failing_after(after, attempts))
    out = tmp_path / "out.parquet"
    result = embed(source, "-o", out, "--keep", "text", "--ray", "local")
    if after:
        assert result.exit_code == 4, result.output
        assert set(attempts[:-1]) == {after}
        assert len(attempts) > ray_pipeline.ATTEMPTS
        check(out, single_machine, source)
    else:
        assert result.exit_code == 1
        assert "the job failed: a node is gone; finished parts are kept in " in result.output
        assert attempts == [0] * ray_pipeline.ATTEMPTS


@pytest.mark.parametrize("loss", ["window", "end"])
def test_windows_that_ray_loses_silently_are_recomputed(
    loss: str, embed: Embed, source: Path, single_machine: pyarrow.Table, tmp_path: Path, without_ray: Callable[[Parts], None]
) -> None:
    attempts: list[int] = []
    without_ray(losing(loss, attempts))
    out = tmp_path / "out.parquet"
    assert embed(source, "-o", out, "--keep", "text", "--ray", "local").exit_code == 4
    assert attempts == {"window": [23, 1], "end": [19, 5]}[loss]
    check(out, single_machine, source)


def test_a_repeated_read_of_a_file_gives_as_many_windows_even_if_some_are_finished(
    embed: Embed, source: Path, tmp_path: Path, without_ray: Callable[[Parts], None]
) -> None:
    """Ray matches the results of a repeated task by position, so a missing window would shift the others."""
    window_counts: list[tuple[int, int]] = []

    def parts(work: ray_pipeline.Work, _: Share, finished: frozenset[str]) -> Iterator[dict[str, Any]]:
        actor = ray_pipeline.Embedder(work)
        for file in range(len(work.job.inputs.files)):
            rows = list(ray_pipeline._read({"file": [file]}, work, finished))
            yield from (part_of(actor, row) for row in rows)
            window_counts.append((len(rows), len(list(ray_pipeline._read({"file": [file]}, work, finished)))))

    without_ray(parts)
    assert embed(source, "-o", tmp_path / "out.parquet", "--ray", "local").exit_code == 4
    assert len(window_counts) == 3
    assert all(window_count == repeated_count > 0 for window_count, repeated_count in window_counts)


def test_a_full_disk_of_a_reader_is_reported(
    embed: Embed, source: Path, tmp_path: Path, without_ray: Callable[[Parts], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []
    without_ray(failing_after(-1, attempts))
    write_renamed = ray_pipeline._write_renamed

    def write_full(content: bytes, path: Path) -> None:
        if path.name.startswith("end-"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_renamed(content, path)

    monkeypatch.setattr(ray_pipeline, "_write_renamed", write_full)
    result = embed(source, "-o", tmp_path / "out.parquet", "--ray", "local")
    assert result.exit_code == 1
    assert "the disk is full (No space left on device)" in result.output
    assert str(tmp_path / ".out.parquet.partial") in result.output
    assert len(attempts) == 1


def test_a_job_is_not_resumed_with_an_input_that_has_fewer_rows(
    embed: Embed, source: Path, tmp_path: Path, without_ray: Callable[[Parts], None]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.parquet"
    shutil.copytree(source, folder)
    without_ray(failing_after(23, []))
    for change in (
        lambda: (folder / "2.txt").unlink(),
        lambda: (folder / "1.txt").write_text("".join((source / "1.txt").read_text().splitlines(keepends=True)[:50])),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray_pipeline, "ATTEMPTS", 1)
            result = embed(folder, "-o", out, "--ray", "local")
        assert result.exit_code == 1, result.output
        change()
        result = embed(folder, "-o", out, "--ray", "local")
        assert result.exit_code == 2, result.output
        assert "the input has fewer rows than before" in result.output
        shutil.rmtree(tmp_path / ".out.parquet.partial")
        shutil.copytree(source, folder, dirs_exist_ok=True)


def test_bad_input_is_reported_as_without_ray(source: Path, tmp_path: Path) -> None:
    for options, words in (
        (("-o", tmp_path / "out.npy", "--ray", "local"), b"--ray writes a folder of Parquet files"),
        (("-o", tmp_path / "out.parquet", "--ray-workers", "2"), b"go with --ray"),
        (("-o", tmp_path / "out.parquet", "--strict", *ON_RAY), b".txt, line 1: empty (--strict)"),
    ):
        process = start(source, *options)
        _, err = process.communicate(timeout=120)
        assert process.returncode in (1, 2), err
        assert words in err
