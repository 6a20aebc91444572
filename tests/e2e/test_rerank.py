"""A Qwen3-Reranker in the real vLLM, under `qembed serve` and as stock vLLM serves it: scores as in transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qembed import rerank
from qembed.checkpoint.find import find
from qembed.checkpoint.reranker import AFTER
from qembed.cli import group
from qembed.vllm import machine, ports
from tests.checkpoints import RERANKER_CONTEXT as CONTEXT
from tests.e2e.http import JSON, send
from tests.e2e.launcher import Launched
from tests.test_rerank import PAIRS

pytestmark = pytest.mark.vllm

CLASSIFIER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}
LONG = ("a question", "long " * CONTEXT)
START_SECONDS = 300


class Vllm:
    """A stock vLLM that serves a checkpoint at `url` once `wait_ready` returns. Leaving the block ends it."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        port = ports.free("127.0.0.1")
        self.url, self._log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
        command += ["--host", "127.0.0.1", "--port", port, "--enforce-eager", "--kv-cache-memory-bytes", 2**26]
        command += ["--max-num-seqs", 8, *options]
        environment = {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, machine.cores()))
        with log.open("w") as output:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True
            )

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)


OPTIONS = {"classifier": ("--runner", "pooling", "--hf-overrides", json.dumps(CLASSIFIER)), "generator": ()}


@pytest.fixture(scope="module")
def servers(reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Vllm]]:
    """The reranker as a classifier and as a generator. Both start at the same time, because most of a start uses one core."""
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as running:
        yield {kind: running.enter_context(Vllm(reranker, logs / kind, *options)) for kind, options in OPTIONS.items()}


@pytest.mark.parametrize("kind", OPTIONS)
def test_scores_are_those_of_transformers(reranker: Path, servers: dict[str, Vllm], kind: str) -> None:
    with rerank.through_transformers(find(str(reranker))).open() as score:
        expected = score(PAIRS, None)
    servers[kind].wait_ready()
    with rerank.through_server(servers[kind].url).open() as score:
        scores = score([*PAIRS, LONG], None)  # LONG exceeds the context and is cut
    assert scores[:-1] == pytest.approx(expected, abs=1e-3)
    assert 0 < scores[-1] < 1


FORMS = ("original", "converted", "int4", "int4 converted")
DOCUMENTS = [*(document for _, document in PAIRS), "Swifts sleep in flight. " * 40, "long " * CONTEXT, f"No.{AFTER}yes"]
QUERY = "where do swifts sleep"


def quantized(source: Path, folder: Path) -> Path:
    """What `qembed quantize` makes of the reranker `source`; the name of the folder does not say what it is."""
    few = ["--calibration-texts", "64", "--max-tokens", "48"]
    result = CliRunner().invoke(group, ["quantize", "--model", str(source), "-o", str(folder), *few])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module", params=FORMS)
def served(
    request: pytest.FixtureRequest, reranker: Path, converted_reranker: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Launched, Path]]:
    """Each form of a reranker under `qembed serve`, with its folder."""
    folder = converted_reranker if "converted" in request.param else reranker
    is_int4 = "int4" in request.param
    if is_int4:
        folder = quantized(folder, tmp_path_factory.mktemp("int4") / "model")
    with Launched("--int4" if is_int4 else "--fp16", "--model", folder, "--port", 0, "--json", "--dtype", "float32") as server:
        server.wait_ready()
        yield server, folder


def test_ranked_documents_have_the_scores_of_transformers(served: tuple[Launched, Path]) -> None:
    server, folder = served
    with rerank.through_transformers(find(str(folder))).open() as score:
        expected = score([(QUERY, document) for document in DOCUMENTS], None)
    whole = _ranked(server, documents=DOCUMENTS)
    assert [item["relevance_score"] for item in whole] == sorted((item["relevance_score"] for item in whole), reverse=True)
    scores = {item["index"]: item["relevance_score"] for item in whole}
    assert [scores[index] for index in range(len(DOCUMENTS))] == pytest.approx(expected, abs=1e-3)
    alone = [_ranked(server, documents=[document])[0]["relevance_score"] for document in DOCUMENTS]
    assert alone == pytest.approx(expected, abs=1e-3)
    assert max(expected) - min(expected) > 0.01


def test_an_instruction_changes_the_scores_as_in_transformers(served: tuple[Launched, Path]) -> None:
    server, folder = served
    with rerank.through_transformers(find(str(folder))).open() as score:
        expected = score(PAIRS, "Find the bird")
    with rerank.through_server(server.url).open() as score:
        assert score(PAIRS, "Find the bird") == pytest.approx(expected, abs=1e-3)
        assert score(PAIRS, None) != pytest.approx(expected, abs=1e-3)


def test_a_reranker_has_its_own_name_only(served: tuple[Launched, Path]) -> None:
    server, _ = served
    assert [model["id"] for model in send(server.url, "GET", "/v1/models").json["data"]] == [server.model]
    assert len(_ranked(server, documents=["x"], model=server.model)) == 1
    body = json.dumps({"query": QUERY, "documents": ["x"], "model": f"{server.model}-query"}).encode()
    assert send(server.url, "POST", "/v1/rerank", body, JSON).status == 404


def _ranked(server: Launched, **body: Any) -> list[dict[str, Any]]:
    answer = send(server.url, "POST", "/v1/rerank", json.dumps({"query": QUERY, **body}).encode(), JSON)
    assert answer.status == 200, answer.raw
    return list(answer.json["results"])
