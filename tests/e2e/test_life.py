"""The life of one server, in the order of the tests: busy, killed, restarted, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest

from qembed.checkpoint.find import SAMPLE, find
from tests.e2e.http import Answer, embed, metric, send
from tests.e2e.launcher import START_SECONDS, Launched, all_gone

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("needs_proc")]

KEY, OTHER = "first-secret-key", "second-secret-key"
QUEUE = 64
LONG = "a longer text of some twenty words, so that a batch of them takes a while to compute on any machine at all " * 4
PRIVATE = "a very private sentence about zebras"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The sample with NaN in the row of one token, and a text with that token; its token [CUST] is beyond the table."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("broken") / "broken"
    shutil.copytree(find(SAMPLE).folder, folder)
    tensors = load_file(folder / "model.safetensors")
    text = " zebra"
    table = next(name for name in tensors if "embed_tokens" in name)
    tensors[table][find(str(folder)).tokenizer().encode(text).ids[0]] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": len(tensors[table]), "content": "[CUST]", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder, text


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# two\n{KEY}\nteam:{OTHER}\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def server(broken: tuple[Path, str], keys: Path) -> Iterator[Launched]:
    limits = ("--max-queue", QUEUE, "--max-client-batch", QUEUE, "--max-restarts", 2, "--shutdown-timeout", 60)
    limits += ("--hang-timeout", 10)
    source = ("--fp16", "--model", broken[0], "--served-model-name", "m", "--port", 0)
    with Launched(*source, *limits, "--api-key-file", keys, "--access-log", "--log-format=json", "--verbose") as process:
        process.wait_ready()
        yield process


def start_requests(server: Launched, count: int, texts: int) -> tuple[list[threading.Thread], list[Answer]]:
    """Start `count` threads that send a request of `texts` texts each; returns the threads and the list of their answers.

    The texts are new each time, because texts present at two deaths of the engine become suspects.
    """
    answers: list[Answer] = []
    text = f"{LONG} {time.monotonic_ns()}"
    ask = lambda: answers.append(embed(server.url, KEY, input=[text] * texts))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def in_flight(server: Launched, seconds: float = 20) -> float:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (texts := metric(server.url, "qembed_texts_in_flight", KEY)) > 0:
            return texts
        time.sleep(0.02)
    return 0


def engine_of(server: Launched) -> int:
    return next(pid for pid in server.started() if "Engine" in Path(f"/proc/{pid}/cmdline").read_text())


def wait_for_restart(server: Launched, times: int) -> set[int]:
    """Wait until the log has `times` restarts and the server answers; returns the statuses of /health meanwhile."""
    deadline = time.monotonic() + START_SECONDS
    statuses = set()
    while server.err.count("vLLM answers again") < times:
        assert time.monotonic() < deadline, server.err
        assert server.process.poll() is None, server.err
        with contextlib.suppress(OSError):  # while the port changes hands
            statuses.add(send(server.url, "GET", "/health").status)
        time.sleep(0.5)
    assert embed(server.url, KEY, input="again").status == 200
    return statuses


def test_without_a_key_only_health_answers(server: Launched) -> None:
    assert send(server.url, "GET", "/health").status == 200
    for path in ("/metrics", "/v1/models", "/version", "/openapi.json", "/nothing"):
        assert send(server.url, "GET", path).status == 401
    for key in (None, "wrong", KEY[:-1], KEY + "x", ""):
        answer = embed(server.url, key, input="text")
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    for key in (KEY, OTHER):
        assert embed(server.url, key, input="text").status == 200


def test_keys_are_in_no_process_no_log_and_no_metric(server: Launched) -> None:
    metrics = send(server.url, "GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"}).raw.decode()
    texts = [server.err, server.out, metrics]
    for pid in [server.process.pid, *server.started()]:
        texts += [Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace") for file in ("cmdline", "environ")]
    for key in (KEY, OTHER):
        assert not any(key in text for text in texts)


def test_a_vector_with_nan_is_a_500_with_its_index_and_is_counted(server: Launched, broken: tuple[Path, str]) -> None:
    answer = embed(server.url, KEY, input=["fine", "fine too", f"one{broken[1]}", "fine"])
    assert answer.status == 500
    assert answer.error.startswith("the vector of input[2] holds NaN")
    assert metric(server.url, "qembed_nonfinite_vectors_total", KEY) == 1
    assert np.isfinite(embed(server.url, KEY, input=["fine"] * 8).vectors).all()


def test_no_text_is_in_the_log(server: Launched) -> None:
    assert embed(server.url, KEY, input=PRIVATE.replace("zebras", "horses")).status == 200
    assert embed(server.url, KEY, input=PRIVATE, dimensions=7).status == 400
    assert "private sentence" not in server.err


def test_every_line_of_the_log_is_json(server: Launched) -> None:
    lines = [json.loads(line) for line in server.err.splitlines()]
    assert {"time", "level", "message"} <= set.intersection(*(set(line) for line in lines))
    assert any(line.get("event") == "plan" for line in lines)
    assert any(line.get("source") == "vllm" for line in lines)


def test_a_token_beyond_the_table_is_named_at_the_start_and_refused(server: Launched) -> None:
    assert "'[CUST]'" in server.err
    answer = embed(server.url, KEY, input=["fine", "hello [CUST] there"])
    assert (answer.status, answer.error.startswith("input[1] holds the token")) == (400, True)
    assert embed(server.url, KEY, input="fine").status == 200
    assert metric(server.url, "qembed_restarts", KEY) == 0


def test_the_access_log_names_the_key_and_holds_no_text(server: Launched) -> None:
    headers = {"Authorization": f"Bearer {OTHER}", "Content-Type": "application/json", "X-Request-Id": "life-1"}
    assert send(server.url, "POST", "/v1/embeddings", b'{"input": ["zebras", "lions"]}', headers).status == 200
    server.wait_stage('"life-1"')
    lines = [json.loads(line) for line in server.err.splitlines()]
    line = next(line for line in lines if line.get("request_id") == "life-1")
    assert (line["event"], line["status"], line["texts"], line["key"]) == ("request", 200, 2, "team")
    assert line["tokens"] > 2
    assert line["seconds"] > 0
    metrics = send(server.url, "GET", "/metrics", headers=headers).raw.decode()
    assert 'qembed_key_texts_total{key="team"}' in metrics


def test_a_changed_file_of_keys_is_read_without_a_restart(server: Launched, keys: Path) -> None:
    before, new = server.started(), "third-secret-key"
    text = keys.read_text()
    keys.write_text("short\n")
    server.wait_stage("stay in force")
    assert embed(server.url, KEY, input="text").status == 200
    other = keys.with_name("other")
    other.write_text(f"{KEY}\nteam:{new}\n")
    other.replace(keys)
    server.wait_stage("2 keys in force")
    time.sleep(0.5)
    assert [embed(server.url, key, input="text").status for key in (KEY, new, OTHER)] == [200, 200, 401]
    keys.write_text(text)
    server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 30
    while embed(server.url, OTHER, input="text").status != 200:
        assert time.monotonic() < deadline, server.err
        time.sleep(0.2)
    assert server.started() == before


def test_a_full_queue_is_503_and_an_openai_client_retries_by_itself(server: Launched) -> None:
    threads, answers = start_requests(server, 4, QUEUE)
    assert in_flight(server)
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=5, timeout=120) as client:
        retried = client.embeddings.create(model="m", input=[LONG] * QUEUE)
    for thread in threads:
        thread.join(120)
    assert len(retried.data) == QUEUE
    statuses = sorted(answer.status for answer in answers)
    assert set(statuses) == {200, 503}
    for answer in answers:
        if answer.status == 503:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert metric(server.url, "qembed_texts_in_flight", KEY) == 0


def test_a_killed_engine_is_a_503_within_seconds_and_is_restarted(server: Launched) -> None:
    before = server.started()
    threads, answers = start_requests(server, 1, QUEUE)
    assert in_flight(server)
    os.kill(engine_of(server), signal.SIGKILL)
    for thread in threads:
        thread.join(15)
        assert not thread.is_alive()
    assert [answer.status for answer in answers] == [503]
    assert "being restarted" in answers[0].error
    assert all_gone(before, 60)
    statuses = wait_for_restart(server, 1)
    assert 503 in statuses
    assert statuses <= {200, 503}
    assert metric(server.url, "qembed_restarts", KEY) == 1


def test_a_hanging_engine_is_a_503_and_is_restarted(server: Launched) -> None:
    before = server.started()
    os.kill(engine_of(server), signal.SIGSTOP)
    threads, answers = start_requests(server, 1, QUEUE)
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    assert [answer.status for answer in answers] == [503]
    assert all_gone(before, 60)
    wait_for_restart(server, 2)
    assert f"vLLM hangs: {QUEUE} texts waiting, and nothing was computed for 1" in server.err
    assert metric(server.url, "qembed_restarts", KEY) == 2


def test_sigterm_finishes_running_requests_and_accepts_no_others(server: Launched) -> None:
    threads, answers = start_requests(server, 1, QUEUE)
    assert in_flight(server)
    server.started()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    try:
        late: int | None = embed(server.url, KEY, input="late").status
    except OSError:
        late = None  # the server has already ended
    for thread in threads:
        thread.join(60)
    assert [answer.status for answer in answers] == [200]
    assert late in (503, None)
    assert server.process.wait(60) == 0
    messages = [json.loads(line)["message"] for line in server.err.splitlines()]
    assert messages[-1] == "stopped"
    assert any(message.startswith("stopping (SIGTERM)") for message in messages)
    assert server.started() == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", urlsplit(server.url).port or 0)) != 0
