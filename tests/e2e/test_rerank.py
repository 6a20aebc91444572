"""A Qwen3-Reranker in the real vLLM, served in both ways of docs/evaluate.md, scores as in transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from qembed import rerank
from qembed.checkpoint.find import find
from qembed.vllm import machine, ports
from tests.checkpoints import RERANKER_CONTEXT as CONTEXT
from tests.test_rerank import BODIES

pytestmark = pytest.mark.vllm

CLASSIFIER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}
LONG = rerank.body("a question", "long " * CONTEXT)
START_SECONDS = 300


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """Run stock vLLM with a checkpoint; yields its URL."""
    port = ports.free("127.0.0.1")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        2**26,
        "--max-num-seqs",
        8,
        *options,
    ]
    environment = {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, machine.cores()))
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "options", [["--runner", "pooling", "--hf-overrides", json.dumps(CLASSIFIER)], []], ids=["class", "text"]
)
def test_scores_are_those_of_transformers(reranker: Path, tmp_path: Path, options: list[str]) -> None:
    with rerank.through_transformers(find(str(reranker))).open() as score:
        expected = score(BODIES)
    with serving(reranker, tmp_path / "log", *options) as url, rerank.through_server(url).open() as score:
        scores = score([*BODIES, LONG])  # LONG exceeds the context and is cut
    assert scores[:-1] == pytest.approx(expected, abs=1e-3)
    assert 0 < scores[-1] < 1
