"""On a real local Ray: two workers, one of them killed; the parts together are what one machine makes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qembed.embed import job_options, ray_cluster, ray_pipeline, windows
from qembed.embed.ray_cluster import Share
from qembed.embed.suspects import CRASHED
from qembed.errors import QembedError
from qembed.vllm import ports

from .conftest import Embed, rejects, started
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


def until(job: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Wait for it while the job runs."""
    while not reached():
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)


def parts_in(records: Path) -> int:
    return len(list(records.glob("part-*.json")))


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
    until(job, lambda: len(list(pids.iterdir())) >= 2 and parts_in(records) > 0)
    before = {int(path.name) for path in pids.iterdir()}
    os.kill(min(before), signal.SIGKILL)
    said = ended(job)
    assert said["parts"] > 20
    after = {int(path.name) for path in pids.iterdir()}
    assert len(after) > len(before)  # another took its place
    check(out, whole, source)


def test_a_text_that_ends_its_actor_twice_is_rejected_and_the_job_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.parquet"
    source.write_text("".join(f"{CRASH if n == 60 else f'text {n}'}\n" for n in range(120)))
    ended(started(source, "-o", out, "--json", *ON_RAY, rows=50))
    assert [(one["id"], one["reason"]) for one in rejects(out / "rejects.jsonl")] == [("61", CRASHED)]
    assert sum(pyarrow.parquet.read_table(part).num_rows for part in out.glob("part-*")) == 119
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("part-")) == [
        "manifest.json", "rejects.jsonl",
    ]  # fmt: skip


def test_a_job_that_is_killed_goes_on_from_its_parts(source: Path, whole: pyarrow.Table, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    job = started(source, "-o", out, "--keep", "text", "--json", *ON_RAY, rows=50, delay=0.3)
    records = tmp_path / ".out.parquet.partial" / "records"
    until(job, lambda: parts_in(records) >= 4)
    job.kill()
    job.communicate()
    assert not out.exists()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.parquet.partial" / "parts").glob("part-*.parquet")}
    ended(started(source, "-o", out, "--keep", "text", "--json", *ON_RAY, rows=50))
    check(out, whole, source)
    assert all((out / name).stat().st_mtime_ns == time for name, time in done.items())


def test_a_killed_node_costs_its_batches_and_not_the_job(
    source: Path, whole: pyarrow.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("QEMBED_TEST_DELAY", "0.3")  # the nodes hand it on to their actors
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = nodes.add_node(num_cpus=1)
        out = tmp_path / "out.parquet"
        share = ("--ray", nodes.address, "--ray-workers", "2", "--ray-cpus", "1")
        job = started(source, "-o", out, "--keep", "text", "--json", *share, rows=50)
        records = tmp_path / ".out.parquet.partial" / "records"
        until(job, lambda: parts_in(records) >= 4)
        nodes.remove_node(lost, allow_graceful=False)
        ended(job)
    finally:
        nodes.shutdown()
    check(out, whole, source)


Parts = Callable[[ray_pipeline.Work, Share, frozenset[str]], Iterator[dict[str, Any]]]


def pipeline(attempts: list[int], fate: Callable[[int, int], str]) -> Parts:
    """In place of the pipeline. `fate` of a file's window: "window", it is lost; "end", so is the rest of its file; or ""."""

    def parts(work: ray_pipeline.Work, _: Share, done: frozenset[str]) -> Iterator[dict[str, Any]]:
        attempts.append(0)
        actor = ray_pipeline.Embedder(work)
        for file in range(len(work.job.inputs.files)):
            for number, row in enumerate(ray_pipeline._read({"file": [file]}, work, done)):
                what = fate(file, number)
                if what == "end":
                    break
                if what != "window":
                    yield made(actor, row)
                    attempts[-1] += 1

    return parts


def made(actor: ray_pipeline.Embedder, row: dict[str, list[Any]]) -> dict[str, Any]:
    return {name: value for name, (value,) in actor(row).items()}


def breaking(after: int, attempts: list[int]) -> Parts:
    """In place of the pipeline: breaks each time that it has made so many parts."""

    def fate(_: int, __: int) -> str:
        if attempts[-1] == after:
            raise AssertionError("a node is gone")
        return ""

    return pipeline(attempts, fate)


def losing(what: str, attempts: list[int]) -> Parts:
    """In place of the pipeline: the first time it loses a window, or the end of a file, and says nothing."""
    return pipeline(attempts, lambda *window: what if len(attempts) == 1 and window == (1, 3) else "")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[Parts], None]:
    """Puts something in the place of the pipeline, for `embed … --ray local`."""
    monkeypatch.setattr(job_options, "_on_cluster", computing)
    monkeypatch.setattr(ray_cluster, "connected", lambda _: nullcontext())
    monkeypatch.setattr(windows, "ROWS", 50)
    return lambda parts: monkeypatch.setattr(ray_pipeline, "_parts", parts)


@pytest.mark.parametrize("after", [0, 7])
def test_what_ray_cannot_mend_is_begun_again_while_parts_are_made(
    after: int, embed: Embed, source: Path, whole: pyarrow.Table, tmp_path: Path, without_ray: Callable[[Parts], None]
) -> None:
    attempts: list[int] = []
    without_ray(breaking(after, attempts))
    out = tmp_path / "out.parquet"
    result = embed(source, "-o", out, "--keep", "text", "--ray", "local")
    if after:
        assert result.exit_code == 4, result.output
        assert set(attempts[:-1]) == {after}
        assert len(attempts) > ray_pipeline.ATTEMPTS
        check(out, whole, source)
    else:
        assert result.exit_code == 1
        assert "the job failed: a node is gone; finished parts are kept in " in result.output
        assert attempts == [0] * ray_pipeline.ATTEMPTS


@pytest.mark.parametrize("what", ["window", "end"])
def test_windows_that_ray_loses_without_a_word_are_missed_and_made(
    what: str, embed: Embed, source: Path, whole: pyarrow.Table, tmp_path: Path, without_ray: Callable[[Parts], None]
) -> None:
    attempts: list[int] = []
    without_ray(losing(what, attempts))
    out = tmp_path / "out.parquet"
    assert embed(source, "-o", out, "--keep", "text", "--ray", "local").exit_code == 4
    assert attempts == {"window": [23, 1], "end": [19, 5]}[what]
    check(out, whole, source)


def test_a_file_that_is_read_again_gives_the_same_windows_though_some_are_done_by_then(
    embed: Embed, source: Path, tmp_path: Path, without_ray: Callable[[Parts], None]
) -> None:
    """Ray counts what a repeated task yields: one window less, and another one would be taken for it."""
    seen: list[tuple[int, int]] = []

    def parts(work: ray_pipeline.Work, _: Share, done: frozenset[str]) -> Iterator[dict[str, Any]]:
        actor = ray_pipeline.Embedder(work)
        for file in range(len(work.job.inputs.files)):
            rows = list(ray_pipeline._read({"file": [file]}, work, done))
            yield from (made(actor, row) for row in rows)
            seen.append((len(rows), len(list(ray_pipeline._read({"file": [file]}, work, done)))))

    without_ray(parts)
    assert embed(source, "-o", tmp_path / "out.parquet", "--ray", "local").exit_code == 4
    assert len(seen) == 3
    assert all(first == again > 0 for first, again in seen)


def test_a_disk_that_a_reader_cannot_write_to_is_told(
    embed: Embed, source: Path, tmp_path: Path, without_ray: Callable[[Parts], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []
    without_ray(breaking(-1, attempts))
    place = ray_pipeline._write_renamed

    def full(content: bytes, path: Path) -> None:
        if path.name.startswith("end-"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        place(content, path)

    monkeypatch.setattr(ray_pipeline, "_write_renamed", full)
    result = embed(source, "-o", tmp_path / "out.parquet", "--ray", "local")
    assert result.exit_code == 1
    assert "the disk is full (No space left on device)" in result.output
    assert str(tmp_path / ".out.parquet.partial") in result.output
    assert len(attempts) == 1


def test_a_job_does_not_go_on_with_an_input_that_has_lost_rows(
    embed: Embed, source: Path, tmp_path: Path, without_ray: Callable[[Parts], None]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.parquet"
    shutil.copytree(source, folder)
    without_ray(breaking(23, []))
    for change in (
        lambda: (folder / "2.txt").unlink(),
        lambda: (folder / "1.txt").write_text("".join((source / "1.txt").read_text().splitlines(keepends=True)[:50])),
    ):
        with pytest.MonkeyPatch.context() as once:
            once.setattr(ray_pipeline, "ATTEMPTS", 1)
            result = embed(folder, "-o", out, "--ray", "local")
        assert result.exit_code == 1, result.output
        change()
        result = embed(folder, "-o", out, "--ray", "local")
        assert result.exit_code == 2, result.output
        assert "the input has fewer rows than before" in result.output
        shutil.rmtree(tmp_path / ".out.parquet.partial")
        shutil.copytree(source, folder, dirs_exist_ok=True)


def test_an_address_without_a_cluster_is_told_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{ports.free('127.0.0.1')}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    for given in (address, f"ray://{address}", "auto"):
        process = started(source, "-o", tmp_path / "out.parquet", "--ray", given)
        _, err = process.communicate(timeout=60)  # Ray itself tries for a quarter of an hour
        assert process.returncode == 1
        assert f"qembed: --ray {given}: no Ray cluster there ({address if given == 'auto' else given}: ".encode() in err
    assert not list(tmp_path.iterdir())


@contextmanager
def saying(answer: bytes) -> Iterator[str]:
    """The address of a server that says `answer` to whoever comes, and then nothing more until the client goes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(answer)
            with suppress(ConnectionError):
                while self.request.recv(1024):
                    pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220"])
def test_an_address_of_something_else_is_told_at_once(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 0.5)
    why = "timed out" if len(answer) < len(ray_cluster.SETTINGS) else "the server there is not Ray"
    with saying(answer) as address, pytest.raises(QembedError) as told, ray_cluster.connected(Share(address)):
        pass
    assert str(told.value) == f"--ray {address}: no Ray cluster there ({address}: {why})"


def test_a_token_that_is_not_there_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    with saying(ray_cluster.SETTINGS) as address:
        process = started(source, "-o", tmp_path / "out.parquet", "--ray", address)
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
