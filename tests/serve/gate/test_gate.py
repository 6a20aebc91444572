"""The gate as an ASGI app, around a fake vLLM with given answers."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qembed.serve.gate import Gate, metrics
from qembed.serve.gate import gate as gate_module
from qembed.vllm import api_keys
from qembed.vllm.gate_rules import Rules

RULES = Rules(folder="", max_model_len=100, dimensions=[4], max_batch=8, max_body=2000, max_queue=8)
GOOD = [0.5, 0.5, 0.5, 0.5]
JSON = ((b"content-type", b"application/json"),)


class Engine:
    """Answers each request with the next of `rounds` as vectors (GOOD when none is left), or with an error."""

    def __init__(self, *rounds: list[list[float]], status: int = 200, seconds: float = 0) -> None:
        self.rounds = list(rounds)
        self.requests: list[dict[str, Any]] = []
        self.status, self.seconds = status, seconds

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.requests.append(json.loads(message["body"]))
        await asyncio.sleep(self.seconds)
        filler = "truncate_prompt_tokens" in self.requests[-1]
        rows = self.rounds.pop(0) if self.rounds and not filler else [GOOD] * len(self.requests[-1]["input"])
        data = [
            {"object": "embedding", "index": index, "embedding": base64.b64encode(np.asarray(row, "f4").tobytes()).decode()}
            for index, row in enumerate(rows)
        ]
        body = {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 7, "total_tokens": 7}}
        if self.status != 200:
            body = {"error": {"message": "engine", "type": "x", "param": None, "code": self.status}}
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client import CollectorRegistry

    original = metrics.Metrics
    monkeypatch.setattr(gate_module, "Metrics", lambda rules, load: original(rules, load, CollectorRegistry()))


async def call(
    gate: Gate, *parts: bytes, path: str = "/v1/embeddings", method: str = "POST", headers: Any = JSON, hang: float = 0
) -> tuple[int, Any, dict[str, str]]:
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts[:-1]]
    messages += [{"type": "http.request", "body": parts[-1] if parts else b"", "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if hang:
            await asyncio.sleep(hang)
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    await gate({"type": "http", "path": path, "method": method, "headers": list(headers)}, receive, send)
    fields = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert int(fields["content-length"]) == len(sent[1]["body"])
    return sent[0]["status"], json.loads(sent[1]["body"]), fields


def ask(gate: Gate, **body: Any) -> tuple[int, Any, dict[str, str]]:
    return asyncio.run(call(gate, json.dumps(body).encode()))


def test_vectors_have_the_requested_encoding() -> None:
    engine = Engine()
    gate = Gate(engine, RULES)
    assert ask(gate, input="x")[1]["data"][0]["embedding"] == GOOD
    encoded = ask(gate, input="x", encoding_format="base64")[1]["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(encoded), "f4").tolist() == GOOD
    assert [request["encoding_format"] for request in engine.requests] == ["base64", "base64"]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_non_finite_vector_is_recomputed(wrong: float, encoding: str) -> None:
    other = [0.25] * 4
    engine = Engine([GOOD, [wrong, 0, 0, 0], GOOD, [0, wrong, 0, 0]], [[0, 0, wrong, 0], other], [other])
    status, answer, _ = ask(Gate(engine, RULES), input=list("abcd"), encoding_format=encoding)
    rows = [item["embedding"] for item in answer["data"]]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "f4").tolist() for row in rows]
    assert (status, rows) == (200, [GOOD, other, GOOD, other])
    fillers, requests = engine.requests[1::2], engine.requests[::2]
    assert [request["input"] for request in requests] == [list("abcd"), ["b", "d"], ["b"]]
    for filler in fillers:  # whole blocks, at least as many as four texts of seven tokens have freed
        assert filler["truncate_prompt_tokens"] % gate_module.BLOCK == 0
        assert filler["truncate_prompt_tokens"] * len(filler["input"]) >= 7 + 4 * gate_module.BLOCK


def test_a_vector_that_stays_non_finite_is_a_500_with_its_index() -> None:
    bad = [float("nan")] * 4
    status, answer, _ = ask(Gate(Engine([GOOD, GOOD, bad], [bad], [bad], [GOOD]), RULES), input=list("abc"))
    assert status == 500
    assert answer["error"]["message"].startswith("the vector of input[2] holds NaN")


def test_a_body_is_measured_whatever_its_content_length() -> None:
    gate = Gate(Engine(), RULES)
    whole = json.dumps({"input": "x"}).encode()
    assert asyncio.run(call(gate, whole[:5], whole[5:]))[0] == 200
    assert asyncio.run(call(gate, b"x" * 1500, b"x" * 501))[0] == 413
    assert asyncio.run(call(gate, headers=(*JSON, (b"content-length", b"2001"))))[0] == 413
    assert asyncio.run(call(gate, headers=(*JSON, (b"content-length", b"9" * 5000))))[0] == 413
    assert gate.load.body_bytes == 0


def test_a_body_that_does_not_arrive_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "BODY_SECONDS", 0.05)
    assert asyncio.run(call(Gate(Engine(), RULES), b"{}", hang=1))[0] == 408


def test_a_full_queue_is_a_503_with_retry_after() -> None:
    async def both() -> list[Any]:
        gate = Gate(Engine(seconds=0.2), RULES)
        body = json.dumps({"input": list("abcde")}).encode()
        return await asyncio.gather(call(gate, body), call(gate, body))

    (first, _, _), (second, answer, headers) = asyncio.run(both())
    assert (first, second) == (200, 503)
    assert 1 <= int(headers["retry-after"]) <= 60
    assert "--max-queue 8" in answer["error"]["message"]


def test_vllms_503_gets_retry_after_and_its_other_errors_are_passed_on() -> None:
    status, _, headers = ask(Gate(Engine(status=503), RULES), input="x")
    assert (status, headers["retry-after"].isdigit()) == (503, True)
    assert ask(Gate(Engine(status=404), RULES), input="x")[:2] == (
        404,
        {"error": {"message": "engine", "type": "x", "param": None, "code": 404}},
    )


def test_engine_errors_while_stopping_are_503() -> None:
    gate = Gate(Engine(status=500, seconds=0.05), RULES)

    async def stop_during_request() -> int:
        task = asyncio.create_task(call(gate, b'{"input": "x"}'))
        await asyncio.sleep(0.01)
        gate.load.draining = True
        return (await task)[0]

    assert asyncio.run(stop_during_request()) == 503
    assert ask(gate, input="x")[0] == 503


def test_a_key_is_required_on_all_routes_but_health() -> None:
    gate = Gate(Engine(), replace(RULES, keys=[api_keys.hashed("right-key")]))
    right, wrong = ((*JSON, (b"authorization", b"Bearer " + key)) for key in (b"right-key", b"wrong-key"))
    assert asyncio.run(call(gate, b'{"input": "x"}', headers=right))[0] == 200
    for path, method in (("/v1/embeddings", "POST"), ("/metrics", "GET"), ("/nothing", "GET"), ("/openapi.json", "GET")):
        for headers in (JSON, wrong):
            assert asyncio.run(call(gate, path=path, method=method, headers=headers))[0] == 401
    assert asyncio.run(call(gate, path="/openapi.json", method="GET", headers=right))[0] == 200
    assert asyncio.run(call(gate, path="/nothing", method="GET", headers=right))[0] == 404


def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(Gate(Engine(), RULES)({"type": "websocket", "path": "/v1/embeddings"}, receive, send))
    assert sent[0]["type"] == "websocket.close"


def test_texts_are_logged_only_with_log_texts(capsys: pytest.CaptureFixture[str]) -> None:
    ask(Gate(Engine(), RULES), input="a private text")
    assert "private" not in capsys.readouterr().out
    ask(Gate(Engine(), replace(RULES, log_texts=True)), input="a private\ntext")
    assert capsys.readouterr().out == 'qembed-texts {"texts": ["a private\\ntext"]}\n'
