"""`qembed eval` as it stands in the README, against the real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qembed.serve import machine
from tests.e2e.launcher import QEMBED, Launched

pytestmark = pytest.mark.vllm
STARTING_SECONDS = 300
STOPPING_SECONDS = 120


def qembed_eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed `qembed` command."""
    return subprocess.run([*QEMBED, "eval", *map(str, arguments)], capture_output=True, text=True, timeout=1200, check=False)


@pytest.fixture(scope="module")
def result(int4_checkpoint: Path, int4_server: Launched) -> subprocess.CompletedProcess[str]:
    """One run with a threshold that cannot be met, which serves all tests."""
    return qembed_eval(
        "--baseline", "fp16", "--json", "--url", int4_server.url, "--model", int4_checkpoint, "--min-cosine", 0.99999,
        "--no-cache",
    )  # fmt: skip


def test_int4_through_vllm_is_near_the_original(result: subprocess.CompletedProcess[str]) -> None:
    found = json.loads(result.stdout)
    overall = found["results"]["overall"]
    assert overall["undefined"] == 0
    assert overall["count"] >= 256
    assert overall["mean"] > 0.95
    assert overall["minimum"] > 0.85
    assert overall["mean"] < 0.99999, "INT4 and FP16 give the same vectors: one side is compared with itself"


def test_every_dimension_and_language_has_its_numbers(result: subprocess.CompletedProcess[str]) -> None:
    found = json.loads(result.stdout)["results"]
    full = found["dimension"]
    assert list(found["by_dimension"]) == [str(size) for size in (32, 64, 128, 256, 512, 768, 1024) if size < full] + [
        str(full)
    ]
    assert found["by_dimension"][str(full)] == found["overall"]
    assert len(found["by_language"]) >= 10
    assert min(part["mean"] for part in found["by_language"].values()) > 0.9
    assert set(found["by_kind"]) == {"query", "document", "code"}


def test_what_ran_is_told(result: subprocess.CompletedProcess[str], int4_server: Launched) -> None:
    found = json.loads(result.stdout)
    assert found["candidate"]["engine"] == "server"
    assert found["candidate"]["url"] == int4_server.url
    assert found["baseline"]["engine"] == "transformers"
    assert found["baseline"]["dtype"] in ("float16", "float32")
    assert found["data"]["cut"] == 0


def test_a_missed_threshold_is_exit_code_1_and_one_line(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("qembed: mean cosine at dimension")
    assert last.endswith("below --min-cosine 0.99999")


def test_a_met_threshold_is_exit_code_0(int4_checkpoint: Path, int4_server: Launched, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Swifts sleep in the air.\nMauersegler schlafen im Flug.\n", encoding="utf-8")
    met = qembed_eval("--url", int4_server.url, "--model", int4_checkpoint, "--data", texts, "--min-cosine", 0.9, "--no-cache")
    assert met.returncode == 0, met.stderr
    assert "2 from texts.txt" in met.stdout


@pytest.mark.usefixtures("needs_proc")
def test_ctrl_c_ends_the_vllm_that_it_started(int4_checkpoint: Path) -> None:
    process = subprocess.Popen(
        [*QEMBED, "eval", "--model", str(int4_checkpoint), "--engine", "vllm", "--no-cache"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # Where the tests themselves run in a shell's background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + STARTING_SECONDS
        while not (sessions := children(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline, "vLLM was not started"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=STOPPING_SECONDS)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "Traceback" not in said
    assert [pid for session in sessions for pid in machine.processes(session)] == []


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that lead a session of their own."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split() if os.getsid(int(child)) == int(child)]
