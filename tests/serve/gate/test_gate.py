"""The gate as an ASGI app, around a fake vLLM with chosen answers."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
import tempfile
import zlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qembed import installation
from qembed.serve.gate import Gate, metrics
from qembed.serve.gate import engine as engine_module
from qembed.serve.gate import gate as gate_module
from qembed.vllm import api_keys, gate_rules
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
    gate: Gate,
    *parts: bytes,
    path: str = "/v1/embeddings",
    method: str = "POST",
    headers: Any = JSON,
    hang: float = 0,
    app: Any = None,
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

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers), **({"app": app} if app else {})}
    await gate(scope, receive, send)
    fields = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    if method != "HEAD":
        assert int(fields["content-length"]) == len(sent[1]["body"])
    return sent[0]["status"], json.loads(sent[1]["body"] or "null"), fields


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
    second = [0.25] * 4
    engine = Engine([GOOD, [wrong, 0, 0, 0], GOOD, [0, wrong, 0, 0]], [[0, 0, wrong, 0], second], [second])
    status, answer, _ = ask(Gate(engine, RULES), input=list("abcd"), encoding_format=encoding)
    rows = [item["embedding"] for item in answer["data"]]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "f4").tolist() for row in rows]
    assert (status, rows) == (200, [GOOD, second, GOOD, second])
    fillers, requests = engine.requests[1::2], engine.requests[::2]
    assert [request["input"] for request in requests] == [list("abcd"), ["b", "d"], ["b"]]
    for filler, before in zip(fillers, requests, strict=False):  # whole blocks, at least those that the texts before freed
        assert filler["truncate_prompt_tokens"] % engine_module.BLOCK == 0
        assert filler["truncate_prompt_tokens"] * len(filler["input"]) >= 7 + len(before["input"]) * engine_module.BLOCK


def test_texts_spoiled_by_one_that_is_at_fault_are_not_counted_as_its_like() -> None:
    bad = [float("nan")] * 4
    gate = Gate(Engine([GOOD, bad, bad, bad], [bad, bad, bad], [bad], [GOOD], [GOOD]), RULES)
    status, answer, _ = ask(gate, input=list("abcd"))
    assert (status, answer["error"]["message"][:28]) == (500, "the vector of input[1] holds")
    assert gate.metrics.nonfinite._value.get() == 1


def test_a_model_with_only_nan_is_computed_again_for_a_few_texts_only() -> None:
    engine = Engine(*[[[float("nan")] * 4] * count for count in (100, 100, *[1] * 100)])
    assert ask(Gate(engine, replace(RULES, max_batch=100, max_queue=100)), input=["x"] * 100)[0] == 500
    assert len([request for request in engine.requests if len(request["input"]) == 1]) < 30


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


def test_a_body_that_does_not_arrive_is_a_408() -> None:
    assert asyncio.run(call(Gate(Engine(), replace(RULES, client_timeout=0.05)), b"{}", hang=1))[0] == 408


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
    gate = Gate(Engine(), replace(RULES, keys={api_keys.hashed("right-key"): "team"}))
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


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate", "two members"])
def test_a_compressed_body_is_read(encoding: str) -> None:
    plain = json.dumps({"input": "x"}).encode()
    raw = {
        "gzip": gzip.compress(plain),
        "deflate": zlib.compress(plain),
        "raw deflate": zlib.compress(plain, wbits=-15),
        "two members": gzip.compress(plain[:5]) + gzip.compress(plain[5:]),
    }[encoding]
    name = b"deflate" if "deflate" in encoding else b"GZIP"
    gate = Gate(Engine(), RULES)
    assert asyncio.run(call(gate, raw, headers=(*JSON, (b"content-encoding", name))))[0] == 200
    assert gate.load.body_bytes == 0


@pytest.mark.parametrize(
    ("encoding", "raw", "status"),
    [
        (b"br", b"{}", 415),
        (b"gzip, gzip", b"{}", 415),
        (b"gzip", b'{"input": "x"}', 400),
        (b"gzip", gzip.compress(b'{"input": "x"}', mtime=0)[:-9], 400),
        (b"gzip", b"", 400),
        (b"deflate", b"\x00\x01", 400),
        (b"gzip", gzip.compress(b"x" * 2001, mtime=0), 413),
        (b"gzip", gzip.compress(b"x" * 10**6, mtime=0), 413),
        (b"gzip", b"".join(gzip.compress(b"x" * 700, mtime=0) for _ in range(3)), 413),
    ],
)
def test_a_body_in_another_encoding_or_beyond_the_limit_is_refused(encoding: bytes, raw: bytes, status: int) -> None:
    gate = Gate(Engine(), RULES)
    answer = asyncio.run(call(gate, raw, headers=(*JSON, (b"content-encoding", encoding))))
    assert answer[0] == status
    if status == 415:
        assert "Content-Encoding" in answer[1]["error"]["message"]
        assert "gzip" in answer[2]["accept-encoding"]
    assert gate.load.body_bytes == 0


class Routes:
    """vLLM's answers to GET."""

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        assert scope["method"] == "GET"
        body = {
            "/v1/models": {"object": "list", "data": [{"id": "a/b", "object": "model"}]},
            "/version": {"version": "0.32"},
            "/health": None,
        }[scope["path"]]
        raw = json.dumps(body).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(raw))]})
        await send({"type": "http.response.body", "body": raw})


def test_head_is_answered_as_get_without_a_body() -> None:
    gate = Gate(Routes(), RULES)
    for path in ("/health", "/v1/models", "/openapi.json", "/version"):
        status, answer, _ = asyncio.run(call(gate, path=path, method="HEAD", headers=()))
        assert (status, answer) == (200, None)
    assert asyncio.run(call(gate, path="/v1/embeddings", method="HEAD", headers=()))[0] == 405


def test_one_model_is_described_by_name() -> None:
    gate = Gate(Routes(), RULES)
    assert asyncio.run(call(gate, path="/v1/models/a/b", method="GET", headers=()))[:2] == (
        200,
        {"id": "a/b", "object": "model"},
    )
    for name in ("a", "b", "a/b/", "x" * 10_000):
        status, answer, _ = asyncio.run(call(gate, path=f"/v1/models/{name}", method="GET", headers=()))
        assert (status, answer["error"]["code"]) == (404, 404)
        assert len(answer["error"]["message"]) < 200
    assert asyncio.run(call(gate, path="/v1/models/a/b", headers=()))[0] == 405


def test_the_version_names_qembed_and_the_default_prompt() -> None:
    gate = Gate(Routes(), replace(RULES, prompts={"query": "q:"}, default_prompt="query", model_prompt="passage"))
    answer = asyncio.run(call(gate, path="/version", method="GET", headers=()))[1]
    own = {"qembed": installation.version(), "default_prompt": "query", "model_prompt": "passage"}
    own |= {"task": "embed", "instruction": None}
    assert answer == {"version": "0.32", **own}


def test_the_request_id_is_the_clients_if_it_is_sane() -> None:
    gate = Gate(Engine(), RULES)
    for path, method in (("/v1/embeddings", "POST"), ("/nothing", "GET"), ("/openapi.json", "GET")):
        sane = (*JSON, (b"X-Request-Id", b"abc-1.2:3"))
        assert (
            asyncio.run(call(gate, b'{"input": "x"}', path=path, method=method, headers=sane))[2]["x-request-id"] == "abc-1.2:3"
        )
        for wrong in (b"", b"a b", b"x" * 129, b"\xc3\xbc", b"<script>"):
            headers = (*JSON, (b"x-request-id", wrong))
            given = asyncio.run(call(gate, b'{"input": "x"}', path=path, method=method, headers=headers))[2]["x-request-id"]
            assert re.fullmatch("[0-9a-f]{32}", given)


def test_the_access_log_has_a_line_per_request_without_its_texts(capsys: pytest.CaptureFixture[str]) -> None:
    keys = {api_keys.hashed("right-key"): "team"}
    right = (*JSON, (b"authorization", b"Bearer right-key"), (b"x-request-id", b"id-1"))
    asyncio.run(call(Gate(Engine(), replace(RULES, keys=keys)), b'{"input": "a private text"}', headers=right))
    assert capsys.readouterr().out == ""
    gate = Gate(Engine(), replace(RULES, keys=keys, access_log=True))
    asyncio.run(call(gate, b'{"input": ["a private text", "b"]}', headers=right))
    asyncio.run(call(gate, b'{"input": "x"}'))
    output = capsys.readouterr().out
    first, second = (json.loads(line.removeprefix(gate_rules.ACCESS)) for line in output.splitlines())
    assert first.pop("seconds") >= 0
    assert first == {
        "request_id": "id-1",
        "method": "POST",
        "path": "/v1/embeddings",
        "status": 200,
        "texts": 2,
        "tokens": 7,
        "key": "team",
    }
    assert (second["status"], second["key"], second["texts"]) == (401, None, 0)
    assert "private" not in output
    assert "right-key" not in output


def test_metrics_count_by_name_of_key() -> None:
    keys = {api_keys.hashed("right-key"): "team", api_keys.hashed("other-key"): "", api_keys.hashed("own-token"): None}
    gate = Gate(Engine(), replace(RULES, keys=keys))
    for key in (b"right-key", b"right-key", b"other-key", b"own-token", b"wrong-key"):
        asyncio.run(call(gate, b'{"input": ["x", "y"]}', headers=(*JSON, (b"authorization", b"Bearer " + key))))
    counts = {
        (sample.name, sample.labels["key"]): sample.value
        for metric in gate.metrics.registry.collect()
        for sample in metric.samples
        if "key" in sample.labels and sample.name.endswith("_total")
    }
    assert counts == {
        ("qembed_key_requests_total", "team"): 2,
        ("qembed_key_texts_total", "team"): 4,
        ("qembed_key_tokens_total", "team"): 14,
        ("qembed_key_requests_total", "unnamed"): 1,
        ("qembed_key_texts_total", "unnamed"): 2,
        ("qembed_key_tokens_total", "unnamed"): 7,
    }
    version = {"version": installation.version()}
    build = next(metric for metric in gate.metrics.registry.collect() if metric.name == "qembed_build_info")
    assert build.samples[0].labels.items() >= version.items()


class Mortal(Engine):
    """An engine that dies at each text with the word "poison"; `app` has vLLM's state of the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(errored=False)))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        texts = json.loads(message["body"])["input"]
        dead = self.app.state.engine_client

        async def replay() -> Any:
            return message

        if dead.errored or any("poison" in text for text in texts):
            dead.errored = True
            self.status = 500
        await super().__call__(scope, replay, send)


def test_a_text_that_ends_the_engine_twice_is_refused_and_its_neighbours_are_not() -> None:
    with tempfile.TemporaryFile() as table:
        rules = replace(RULES, suspects=table.fileno())

        def start(*batches: list[str]) -> list[tuple[int, Any]]:
            """The answers of a new server process to concurrent batches."""
            engine = Mortal()

            async def all_at_once() -> Any:
                gate = Gate(engine, rules)
                bodies = [json.dumps({"input": texts}).encode() for texts in batches]
                return await asyncio.gather(*(call(gate, body, app=engine.app) for body in bodies))

            return [(status, answer) for status, answer, _ in asyncio.run(all_at_once())]

        batch = ["good", "poison", "fine"]
        assert [status for status, _ in start(["before"], batch)] == [503, 503]  # all requests in flight fail
        assert [status for status, _ in start(batch)] == [503]
        (status, answer), (second, _), (third, _) = start(batch, ["good", "fine"], ["before", "new"])
        assert (status, second, third) == (400, 200, 200)
        assert answer["error"]["message"].startswith("input[1] ended the engine")
        table.seek(0)
        assert b"poison" not in table.read()


def test_suspects_are_computed_alone_and_answered_as_one_batch() -> None:
    with tempfile.TemporaryFile() as table:
        rules = replace(RULES, suspects=table.fileno())
        mortal = Mortal()
        assert asyncio.run(call(Gate(mortal, rules), b'{"input": ["a", "poison", "c"]}', app=mortal.app))[0] == 503
        engine = Engine([[1.0] * 4, [4.0] * 4], [[2.0] * 4], [[3.0] * 4])
        status, answer, _ = ask(Gate(engine, rules), input=["x", "a", "c", "y"])
        assert status == 200
        assert [request["input"] for request in engine.requests] == [["x", "y"], ["a"], ["c"]]
        assert [(item["index"], item["embedding"][0]) for item in answer["data"]] == [(0, 1), (1, 2), (2, 3), (3, 4)]
        assert answer["usage"]["prompt_tokens"] == 21
        engine.requests.clear()
        ask(Gate(engine, rules), input=["x", "a", "c"])  # no longer suspects, also in the next process
        assert [request["input"] for request in engine.requests] == [["x", "a", "c"]]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([b"localhost:8000"], 200),
        ([b"[::1]"], 200),
        ([b"evil.example:8000"], 421),
        ([], 421),
        ([b"localhost", b"evil.example"], 421),
        ([b"localhost", b"localhost"], 421),
        ([b"\xff"], 421),
    ],
)
def test_a_request_with_another_host_is_refused(sent: list[bytes], status: int) -> None:
    gate = Gate(Engine(), replace(RULES, hosts=["localhost"]))
    names = tuple((b"Host", name) for name in sent)
    answer = asyncio.run(call(gate, b'{"input": "x"}', headers=(*JSON, *names)))
    assert answer[0] == status
    if status == 421:
        assert "--allowed-host" in answer[1]["error"]["message"]
    for path, reached in (("/openapi.json", 200), ("/nothing", 404)):
        assert asyncio.run(call(gate, path=path, method="GET", headers=names))[0] == (reached if status == 200 else 421)


def test_a_long_host_is_shortened_in_the_message() -> None:
    gate = Gate(Engine(), replace(RULES, hosts=["localhost"]))
    status, answer, _ = asyncio.run(call(gate, b'{"input": "x"}', headers=(*JSON, (b"host", b"x" * 60_000))))
    assert status == 421
    assert len(answer["error"]["message"]) < 300


def test_health_accepts_any_host() -> None:
    gate = Gate(Routes(), replace(RULES, hosts=["localhost"]))
    assert asyncio.run(call(gate, path="/health", method="GET", headers=((b"host", b"10.1.2.3:8000"),)))[0] == 200


def test_a_large_batch_goes_to_vllm_in_parts_and_has_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PART_TEXTS", 3)
    monkeypatch.setattr(engine_module, "PART_CHARACTERS", 10)
    bad = [float("nan")] * 4
    for encoding in ("float", "base64"):
        rows = [[float(number)] * 4 for number in range(6)]
        engine = Engine(rows[:3], [rows[3], bad], [rows[5]], [rows[4]])
        texts = ["a", "b", "c", "d", "e" * 8, "f" * 20]
        status, answer, _ = ask(Gate(engine, RULES), input=texts, encoding_format=encoding)
        inputs = [request["input"] for request in engine.requests if "truncate_prompt_tokens" not in request]
        assert (status, inputs) == (200, [texts[:3], texts[3:5], texts[5:], [texts[4]]])
        vectors = [item["embedding"] for item in answer["data"]]
        if encoding == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "f4").tolist() for vector in vectors]
        assert vectors == rows
        assert [item["index"] for item in answer["data"]] == list(range(6))
        assert answer["usage"] == {"prompt_tokens": 21, "total_tokens": 21}


def test_an_error_of_vllm_in_a_part_is_the_error_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PART_TEXTS", 1)
    assert ask(Gate(Engine(status=404), RULES), input=["a", "b"])[0] == 404


def test_answers_count_as_memory_until_clients_have_received_them() -> None:
    async def answer_bytes_and_status() -> tuple[int, int]:
        gate = Gate(Engine(), replace(RULES, max_body=100, max_batch=4))
        received = asyncio.Event()

        async def slow(message: Any) -> None:
            if message["type"] == "http.response.body":
                await received.wait()

        async def receive() -> Any:
            return {"type": "http.request", "body": b'{"input": ["a", "b", "c", "d"]}', "more_body": False}

        scope = {"type": "http", "path": "/v1/embeddings", "method": "POST", "headers": list(JSON)}
        tasks = [asyncio.create_task(gate(scope, receive, slow)) for _ in range(2)]
        for _ in range(500):
            if gate.load.answer_bytes and not gate.load.texts:
                break
            await asyncio.sleep(0.01)
        assert gate.load.requests == 2  # a stopping server waits for them
        during = gate.load.answer_bytes
        status = (await call(gate, b'{"input": "x"}'))[0]
        received.set()
        await asyncio.gather(*tasks)
        assert gate.load.answer_bytes == gate.load.requests == 0
        assert (await call(gate, b'{"input": "x"}'))[0] == 200
        return during, status

    assert asyncio.run(answer_bytes_and_status()) == (2 * 4 * 4 * 24, 503)  # answers, texts, numbers, bytes of a number


def test_a_logged_request_has_a_bounded_line(capsys: pytest.CaptureFixture[str]) -> None:
    rules = replace(RULES, log_texts=True, max_model_len=10**6, max_body=10**6, max_batch=100, max_queue=100)
    ask(Gate(Engine(), rules), input=["word " * 10_000, *(str(number) for number in range(99))])
    line = capsys.readouterr().out
    record = json.loads(line.removeprefix(gate_rules.TEXTS))
    assert len(line) < 40_000
    assert record["texts"][0].endswith("… (50000 in all)")
    assert len(record["texts"]) + record["left_out"] == 100
