"""`qembed eval` as in docs/evaluate.md, against the real vLLM, with all tasks on the bundled data sets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qembed.vllm import machine
from tests.e2e.launcher import QEMBED, Launched

pytestmark = pytest.mark.vllm
STARTING_SECONDS = 300
STOPPING_SECONDS = 120


def start_eval(*arguments: object) -> subprocess.Popen[str]:
    """Start the installed `qembed` command."""
    command = [*QEMBED, "eval", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def qembed_eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed `qembed` command."""
    return finish(start_eval(*arguments))


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a command."""
    out, err = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the reports."""
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module", autouse=True)
def evaluation(int4_checkpoint: Path, int4_server: Launched, reports: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of all tasks with a threshold that cannot be met, shared by all tests.

    It starts with the first test of the module, so that the tests that do not need it run meanwhile.
    """
    process = start_eval(
        "--baseline", "fp16", "--json", "--url", int4_server.url, "--model", int4_checkpoint, "--min-cosine", 0.99999,
        "--no-cache", "--task", "all", "--report", reports / "r.html", "--report", reports / "r.md",
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def result(evaluation: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """The result of `evaluation`."""
    return finish(evaluation)


def test_speed_of_a_real_server(int4_checkpoint: Path, int4_server: Launched, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Swifts sleep in the air.\nMauersegler schlafen im Flug.\n", encoding="utf-8")
    result = qembed_eval(
        "--url", int4_server.url, "--baseline-url", int4_server.url, "--model", int4_checkpoint,
        "--data", tmp_path / "texts.txt", "--task", "speed", "--speed-batches", "1,4", "--speed-lengths", 16, "--no-cache",
        "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    speed = json.loads(result.stdout)["speed"]
    assert [shape["batch"] for shape in speed["shapes"]] == [1, 4]
    assert all(0 < shape["low"] <= shape["ratio"] <= shape["high"] for shape in speed["shapes"])
    assert speed["candidate"]["memory"] > 10**8, "the /metrics of a qembed server have its memory"


def test_a_met_threshold_is_exit_code_0(int4_checkpoint: Path, int4_server: Launched, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Swifts sleep in the air.\nMauersegler schlafen im Flug.\n", encoding="utf-8")
    result = qembed_eval(
        "--url", int4_server.url, "--model", int4_checkpoint, "--data", texts, "--min-cosine", 0.9, "--no-cache"
    )
    assert result.returncode == 0, result.stderr
    assert "2 from texts.txt" in result.stdout


@pytest.mark.usefixtures("needs_proc")
def test_ctrl_c_ends_the_vllm_that_it_started(int4_checkpoint: Path) -> None:
    process = subprocess.Popen(
        [*QEMBED, "eval", "--model", str(int4_checkpoint), "--engine", "vllm", "--no-cache"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + STARTING_SECONDS
        while not (sessions := children(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline, "vLLM was not started"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=STOPPING_SECONDS)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert [pid for session in sessions for pid in machine.processes(session)] == []


def test_int4_through_vllm_is_near_the_original(result: subprocess.CompletedProcess[str]) -> None:
    report = json.loads(result.stdout)
    overall = report["results"]["overall"]
    assert overall["undefined"] == 0
    assert overall["count"] >= 256
    assert overall["mean"] > 0.95
    assert overall["minimum"] > 0.85
    assert overall["mean"] < 0.99999, "INT4 and FP16 give the same vectors: one side is compared with itself"


def test_every_dimension_and_language_is_reported(result: subprocess.CompletedProcess[str]) -> None:
    report = json.loads(result.stdout)["results"]
    full = report["dimension"]
    assert list(report["by_dimension"]) == [str(size) for size in (32, 64, 128, 256, 512, 768, 1024) if size < full] + [
        str(full)
    ]
    assert report["by_dimension"][str(full)] == report["overall"]
    assert len(report["by_language"]) >= 10
    assert min(part["mean"] for part in report["by_language"].values()) > 0.9
    assert set(report["by_kind"]) == {"query", "document", "code"}


def test_all_tasks_run_offline_and_int4_is_near_in_each(result: subprocess.CompletedProcess[str]) -> None:
    tasks = {task["task"]: task for task in json.loads(result.stdout)["tasks"]}
    assert list(tasks) == ["retrieval", "classification", "sts"]
    for task in tasks.values():
        (main,) = [metric for metric in task["metrics"] if metric["main"]]
        assert main["interval"][0] <= main["difference"] <= main["interval"][1]
        assert abs(main["difference"]) < 0.1
        assert set(task["unusable"].values()) == {0}
    metrics = {(metric["name"], metric["group"]): metric for metric in tasks["retrieval"]["metrics"]}
    assert metrics["nDCG@10", "en → en"]["baseline"] > 0.4, "chance is below 0.1"
    assert metrics["nDCG@10", None]["mixed"] > 0.1
    (accuracy,) = [metric for metric in tasks["classification"]["metrics"] if metric["main"]]
    assert accuracy["baseline"] > 0.3, "chance is 1/6"


def test_the_reports_hold_the_measured_numbers(result: subprocess.CompletedProcess[str], reports: Path) -> None:
    report = json.loads(result.stdout)
    for name in ("r.html", "r.md"):
        text = (reports / name).read_text(encoding="utf-8")
        assert f"{report['results']['overall']['mean']:.5f}" in text
        assert "a check failed" in text
        assert "computed in" in text


def test_the_result_names_both_engines(result: subprocess.CompletedProcess[str], int4_server: Launched) -> None:
    report = json.loads(result.stdout)
    assert report["candidate"]["engine"] == "server"
    assert report["candidate"]["url"] == int4_server.url
    assert report["baseline"]["engine"] == "transformers"
    assert report["baseline"]["dtype"] in ("float16", "float32")
    assert report["data"]["cut"] == 0


def test_a_missed_threshold_is_exit_code_1_and_one_line(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 1, result.stderr
    line = [line for line in result.stderr.splitlines() if line.startswith("qembed: ")][-1]
    assert line.startswith("qembed: mean cosine at dimension")
    assert line.endswith("below --min-cosine 0.99999")


def children(pid: int) -> list[int]:
    """Child processes of `pid` that lead a session of their own."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split() if os.getsid(int(child)) == int(child)]
