"""`qembed embed` with the real vLLM: in its own process, through a server, and on Ray; killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from qembed.client import embeddings
from tests.e2e.launcher import QEMBED, Launched

pytestmark = pytest.mark.vllm
ROWS = 4500
"""Enough for two windows."""


def start_embed(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*QEMBED, "embed", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def summary_of(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    """Wait for the end of `qembed embed --json`; returns the summary that it printed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    summary: dict[str, Any] = json.loads(out)
    return summary


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short texts, and a few long ones."""
    path = tmp_path_factory.mktemp("embed") / "in.jsonl"
    with path.open("w") as file:
        for n in range(ROWS):
            text = f"ticket {n} {'about the player ' * (n % 3 if n % 500 else 60)}"
            file.write(json.dumps({"id": f"t{n}", "text": text}) + "\n")
    return path


def arguments(source: Path, out: Path, checkpoint: Path) -> tuple[object, ...]:
    return source, "-o", out, "--model", checkpoint, "--json", "--dimensions", 128


@pytest.fixture(scope="module")
def runs(source: Path, int4_checkpoint: Path) -> tuple[Path, Path]:
    """The outputs of an uninterrupted run and of one killed after its first window.

    Both start at the same time, because most of a start uses one core.
    """
    whole, interrupted = source.with_name("whole.npy"), source.with_name("killed.npy")
    processes = [start_embed(*arguments(source, out, int4_checkpoint)) for out in (whole, interrupted)]
    journal = interrupted.with_name(".killed.npy.partial") / "journal.jsonl"
    while not journal.exists() or b'"done"' not in journal.read_bytes():
        assert processes[1].poll() is None, processes[1].communicate()
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    assert not interrupted.exists()
    summary = summary_of(processes[0])
    assert (summary["vectors"], summary["dimensions"], summary["rejected"]) == (ROWS, 128, 0)
    return whole, interrupted


@pytest.fixture
def uninterrupted(runs: tuple[Path, Path]) -> Path:
    """The vectors of an uninterrupted run."""
    return runs[0]


def test_a_killed_run_is_resumed_and_its_output_is_byte_identical(
    source: Path, runs: tuple[Path, Path], int4_checkpoint: Path
) -> None:
    whole, out = runs
    summary = summary_of(start_embed(*arguments(source, out, int4_checkpoint)))
    assert 0 < summary["resumed"] < ROWS
    assert out.read_bytes() == whole.read_bytes()
    assert out.with_name("killed.ids.jsonl").read_bytes() == whole.with_name("whole.ids.jsonl").read_bytes()


def test_the_vectors_equal_those_of_the_server_in_input_order(source: Path, uninterrupted: Path, int4_server: Launched) -> None:
    vectors = np.load(uninterrupted, mmap_mode="r")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    lines = source.read_text().splitlines()
    places = [0, 1, 2, 499, 500, 4095, 4096, ROWS - 1]
    texts = [json.loads(lines[place])["text"] for place in places]
    server_vectors = embeddings.embed(texts, url=int4_server.url, model=int4_server.model, dimensions=128)
    assert ((vectors[places] * server_vectors).sum(axis=1) > 0.999).all()


def test_vectors_through_a_server_are_the_same(
    source: Path, uninterrupted: Path, int4_server: Launched, tmp_path: Path
) -> None:
    few, out = tmp_path / "few.jsonl", tmp_path / "few.npy"
    lines = source.read_text().splitlines()[:600]
    few.write_text("\n".join(lines))
    urls = ("--url", int4_server.url, "--url", int4_server.url.removesuffix("/v1"))
    summary = summary_of(start_embed(few, "-o", out, *urls, "--dimensions", 128, "--json"))
    assert summary["vectors"] == 600
    assert (np.sum(np.load(out) * np.load(uninterrupted, mmap_mode="r")[:600], axis=1) > 0.999).all()


def test_on_ray_each_actor_has_an_engine_and_the_parts_are_complete(
    source: Path, uninterrupted: Path, int4_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    lines = source.read_text().splitlines()[:800]
    folder, out = tmp_path / "in", tmp_path / "out.parquet"
    folder.mkdir()
    for number, at in enumerate((0, 400)):
        (folder / f"{number}.jsonl").write_text("\n".join(lines[at : at + 400]))
    share = ("--ray", "local", "--ray-workers", 2, "--ray-cpus", 1)
    summary = summary_of(start_embed(folder, "-o", out, "--model", int4_checkpoint, "--json", "--dimensions", 128, *share))
    assert (summary["vectors"], summary["dimensions"], summary["rejected"]) == (800, 128, 0)
    parts = json.loads((out / "manifest.json").read_text())["parts"]
    assert len(parts) == 2
    table = pyarrow.parquet.read_table([out / part["file"] for part in parts])
    assert table["id"].to_pylist() == [json.loads(line)["id"] for line in lines]
    vectors = np.stack(table["vector"].to_numpy())
    assert ((vectors * np.load(uninterrupted, mmap_mode="r")[:800]).sum(axis=1) > 0.999).all()
