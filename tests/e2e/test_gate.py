"""Requests that the server accepts and refuses, over HTTP, with the real vLLM behind the gate."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from qembed import installation
from qembed.checkpoint.find import find
from qembed.text.chunking import chunks
from qembed.vllm.arguments import MAX_HEADER
from tests.e2e.http import EMBEDDINGS, JSON, Answer, embed, metric, send
from tests.e2e.launcher import QEMBED, Launched

pytestmark = pytest.mark.vllm


def vector(server: Launched, text: str, **options: Any) -> np.ndarray[Any, Any]:
    return np.asarray(embed(server.url, input=text, **options).vectors[0])


def equal(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return bool(a @ b > 0.9999)


def raw(body: bytes, headers: dict[str, str] | None = None, method: str = "POST", path: str = EMBEDDINGS) -> Any:
    return lambda server: send(server.url, method, path, body, JSON if headers is None else headers)


def request(**body: Any) -> Any:
    return raw(json.dumps({"input": "good", **body}).encode())


def on_socket(*parts: bytes, pause: float = 0.0, read: bool = True) -> Callable[[Launched], int]:
    """Send bytes on a bare socket, with pauses between them; returns the status, or 0 if the connection closed without one."""

    def ask(server: Launched) -> int:
        where = urlsplit(server.url)
        with socket.create_connection((where.hostname, where.port), timeout=60) as wire:
            for part in parts:
                wire.sendall(part)
                time.sleep(pause)
            if not read:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
                return 0
            response = wire.recv(4096)
        return int(response.split()[1]) if response else 0

    return ask


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
BODY = b'{"input": "good"}'
GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CASES: dict[str, tuple[Callable[[Launched], Answer | int], set[int]]] = {
    "empty body": (raw(b""), {400}),
    "not JSON": (raw(b"input=good"), {400}),
    "cut JSON": (raw(b'{"input": "go'), {400}),
    "a list": (raw(b'["good"]'), {400}),
    "a text": (raw(b'"good"'), {400}),
    "null": (raw(b"null"), {400}),
    "broken UTF-8": (raw(b'{"input": "\xff\xfe"}'), {400}),
    "a surrogate in UTF-8": (raw(b'{"input": "\xed\xa0\x80"}'), {400}),
    "UTF-16": (raw('{"input": "good"}'.encode("utf-16")), {400}),
    "half a surrogate pair": (raw(rb'{"input": "\ud800"}'), {400}),
    "half a pair in the model": (raw(rb'{"input": "x", "model": "\udfff"}'), {400}),
    "deep nesting": (raw(b'{"input": ' + b"[" * 200_000), {400}),
    "deep objects": (raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), {400}),
    "NaN": (raw(b'{"input": "x", "dimensions": NaN}'), {400}),
    "a number of 10,000 digits": (raw(b'{"input": "x", "dimensions": ' + b"9" * 10_000 + b"}"), {400}),
    "no input": (raw(b"{}"), {400}),
    "input null": (request(input=None), {400}),
    "input a number": (request(input=5), {400}),
    "input an object": (request(input={"text": "x"}), {400}),
    "input an empty list": (request(input=[]), {400}),
    "input of null": (request(input=["x", None]), {400}),
    "input of mixed types": (request(input=["x", 1]), {400}),
    "input of lists of texts": (request(input=[["x"]]), {400}),
    "token ids": (request(input=[1, 2, 3]), {400}),
    "lists of token ids": (request(input=[[1, 2, 3]]), {400}),
    "an empty text": (request(input=""), {400}),
    "white space": (request(input=["good", " \n\t "]), {400}),
    "a zero-width space": (request(input=["\u200b"]), {400}),
    "10,000 texts": (request(input=["x"] * 10_000), {400}),
    "a text of 5 MB": (request(input="x" * 5_000_000), {400}),
    "a text of 5 MB of white space": (request(input=" " * 5_000_000), {400}),
    "a text of 20 MB of combining marks": (request(input="a" + "\u0301" * 200_000), {400}),
    "a text that is too long": (request(input="word " * 40_000), {400}),
    "negative dimensions": (request(dimensions=-1), {400}),
    "no dimensions": (request(dimensions=0), {400}),
    "huge dimensions": (request(dimensions=2**63), {400}),
    "dimensions a text": (request(dimensions="64"), {400}),
    "dimensions a fraction": (request(dimensions=64.5), {400}),
    "dimensions true": (request(dimensions=True), {400}),
    "an unknown encoding": (request(encoding_format="bytes"), {400}),
    "encoding a list": (request(encoding_format=["float"]), {400}),
    "an unknown prompt": (request(prompt_name="../../etc/passwd"), {400}),
    "prompt and instruction": (request(prompt_name="query", instruction="find"), {400}),
    "instruction a number": (request(instruction=5), {400}),
    "truncation below nothing": (request(truncate_prompt_tokens=-5), {400}),
    "truncation beyond the model": (request(truncate_prompt_tokens=10**9), {400}),
    "an unknown model": (request(model="gpt-4"), {404}),
    "model a number": (request(model=7), {400}),
    "user an object": (request(user={}), {400}),
    "chat messages": (request(messages=[{"role": "user", "content": "x"}]), {400}),
    "a prototype key": (raw(b'{"__proto__": {"x": 1}, "constructor": 1}'), {400}),
    "40 MB": (raw(b'{"input": "' + b"x" * 40_000_000 + b'"}'), {413}),
    "a misspelt field": (request(dimension=64), {400}),
    "lists of texts": (request(input=[["a", "b"]]), {400}),
    "brotli": (raw(BODY, {**JSON, "Content-Encoding": "br"}), {415}),
    "declared as gzip, but not gzip": (raw(BODY, {**JSON, "Content-Encoding": "gzip"}), {400}),
    "a gzip bomb": (raw(gzip.compress(b" " * 100_000_000), {**JSON, "Content-Encoding": "gzip"}), {413}),
    "a model that is not served": (raw(b"", method="GET", path="/v1/models/other"), {404}),
    "a form": (raw(b"input=x", {"Content-Type": "application/x-www-form-urlencoded"}), {415}),
    "text/plain, as another site's page would send": (raw(BODY, {"Content-Type": "text/plain"}), {415}),
    "no content type": (raw(BODY, {}), {415}),
    "GET": (raw(b"", method="GET"), {405}),
    "DELETE": (raw(b"", method="DELETE"), {405}),
    "OPTIONS, before another site's page asks": (raw(b"", {"Origin": "http://evil"}, method="OPTIONS"), {405}),
    "another route of vLLM's": (raw(BODY, path="/pooling"), {404}),
    "a path upwards": (raw(BODY, path="/v1/../pooling"), {404}),
    "a path twice encoded": (raw(BODY, path="/%76%31/embeddings%2f"), {404}),
    "no HTTP": (on_socket(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n"), {0, 400}),
    "a negative length": (on_socket(HEAD.replace(b"%d", b"-5")), {0, 400}),
    "a length that is too large": (on_socket(HEAD % 99_999_999_999), {413}),
    "two lengths": (on_socket(HEAD.replace(b"%d", b"5\r\nContent-Length: 7") + BODY), {0, 400}),
    "a broken chunk": (
        on_socket(HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"zz\r\n" + BODY),
        {0, 400},
    ),
    "a header of 200 kB": (on_socket(b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"), {0, 200, 400, 431}),
    "a header of 64 KiB without end": (on_socket(b"GET /health HTTP/1.1\r\nX: " + b"a" * MAX_HEADER), {400}),
    "cut after the head": (on_socket(HEAD % 1000, read=False), {0}),
    "cut in the body": (on_socket(HEAD % 1000 + BODY, read=False), {0}),
    "cut during the computation": (on_socket(HEAD % len(BODY) + BODY, read=False), {0}),
    "slow, but complete": (on_socket(*[(HEAD % len(BODY) + BODY)[at : at + 30] for at in range(0, 150, 30)], pause=0.2), {200}),
}


@pytest.fixture(scope="module", autouse=True)
def idle_connection(int4_server: Launched) -> Iterator[tuple[socket.socket, float]]:
    """A connection that is idle since the first test of the module, and the time of its request (time.monotonic)."""
    where = urlsplit(int4_server.url)
    with socket.create_connection((where.hostname, where.port), timeout=60) as wire:
        wire.sendall(GET_HEALTH)
        assert b" 200 " in wire.recv(4096)
        yield wire, time.monotonic()


@pytest.mark.parametrize("name", list(CASES))
def test_a_bad_request_is_refused_and_a_good_one_works_after_it(int4_server: Launched, name: str) -> None:
    ask, allowed = CASES[name]
    answer = ask(int4_server)
    status = answer if isinstance(answer, int) else answer.status
    assert status in allowed, answer
    if isinstance(answer, Answer):
        assert len(answer.error) < 1000
    assert np.isfinite(vector(int4_server, "good", model=int4_server.model)).all()


def test_there_are_at_least_forty_bad_requests() -> None:
    assert len(CASES) >= 40


def test_an_empty_text_is_named_by_index_and_a_long_one_by_its_length_and_the_limit(int4_server: Launched) -> None:
    assert embed(int4_server.url, input=["good", "fine", "\ufeff"]).error.startswith("input[2] is empty")
    limit = int4_server.ready["max_model_len"]
    tokens = len(find(str(int4_server.ready["folder"])).tokenizer().encode("word " * limit).ids)
    assert embed(int4_server.url, input=["good", "word " * limit]).error.startswith(
        f"input[1] has {tokens} tokens; the limit is {limit}."
    )


def test_a_text_that_is_cut_has_the_vector_of_its_beginning(int4_server: Launched) -> None:
    """The model's last token is still appended; without it the vector would differ."""
    text = "word " * 2 * int(int4_server.ready["max_model_len"])
    tokenizer = find(str(int4_server.ready["folder"])).tokenizer()
    ids = tokenizer.encode(text).ids
    beginning = tokenizer.decode(ids[:19])
    assert tokenizer.encode(beginning).ids == [*ids[:19], ids[-1]]
    assert equal(vector(int4_server, text, truncate_prompt_tokens=20), vector(int4_server, beginning))
    assert (
        embed(int4_server.url, input=text, truncate_prompt_tokens=-1).json["usage"]["prompt_tokens"]
        == (int4_server.ready["max_model_len"])
    )


def test_a_text_in_parts_has_the_mean_of_their_vectors(int4_server: Launched) -> None:
    limit = int(int4_server.ready["max_model_len"])
    text = " ".join(f"Sentence {number} is about music." for number in range(limit // 3))
    answer = embed(int4_server.url, input=["short", text], long_texts="chunk").json
    tokenizer = find(str(int4_server.ready["folder"])).tokenizer()

    def counts(texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]

    parts = [text[span.start : span.end] for span in chunks(text, limit, limit // 8, counts)]
    assert answer["data"][1]["parts"] == len(parts) > 1
    assert "parts" not in answer["data"][0]
    mean = np.average([vector(int4_server, part) for part in parts], axis=0, weights=counts(parts))
    assert float(mean @ np.asarray(answer["data"][1]["embedding"])) / np.linalg.norm(mean) > 0.9999
    assert abs(np.linalg.norm(answer["data"][1]["embedding"]) - 1) < 1e-5


def test_prompts_and_instructions_are_the_same_as_texts_that_hold_them(int4_server: Launched) -> None:
    query = find(str(int4_server.ready["folder"])).prompts["query"]
    bare = vector(int4_server, "music player")
    assert equal(vector(int4_server, "music player", prompt_name="query"), vector(int4_server, query + "music player"))
    assert equal(vector(int4_server, "music player", prompt_name="document"), bare)
    task = "Find programs"
    instructed = vector(int4_server, f"Instruct: {task}\nQuery:music player")
    assert equal(vector(int4_server, "music player", instruction=task), instructed)
    assert not equal(instructed, bare)


def test_text_is_cleaned_on_the_way_in(int4_server: Launched) -> None:
    assert equal(vector(int4_server, "Zu\u0308\u200brich\x00"), vector(int4_server, "Zürich"))
    assert not equal(vector(int4_server, "👨‍👩‍👧"), vector(int4_server, "👨👩👧"))


@pytest.mark.parametrize("upgrade", ["h2c", "TLS/1.0", "websocket"])
def test_a_post_that_asks_for_an_upgrade_is_answered_as_http_1_1(int4_server: Launched, upgrade: str) -> None:
    body = json.dumps({"model": int4_server.model, "input": "hello"}).encode()
    asking = {**JSON, "Connection": "Upgrade, HTTP2-Settings", "Upgrade": upgrade, "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABk"}
    if upgrade == "websocket":
        asking |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
    plain = send(int4_server.url, "POST", EMBEDDINGS, body, JSON)
    assert send(int4_server.url, "POST", EMBEDDINGS, body, asking).vectors == plain.vectors


def test_base64_and_numbers_are_the_same_vector(int4_server: Launched) -> None:
    encoded = embed(int4_server.url, input="text", encoding_format="base64").json["data"][0]["embedding"]
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(encoded), np.float32), vector(int4_server, "text").astype("f4")
    )


def test_only_the_routes_of_an_embedding_server_are_open(int4_server: Launched) -> None:
    for path in ("/health", "/version", "/metrics", "/v1/models", "/openapi.json"):
        assert send(int4_server.url, "GET", path).status == 200, path
    for path in ("/docs", "/redoc", "/tokenize", "/detokenize", "/pooling", "/score", "/v1/score", "/v1/rerank", "/rerank"):
        assert send(int4_server.url, "POST", path, BODY, JSON).status == 404, path
    for path in ("/invocations", "/ping", "/load", "/server_info", "/v2/embed", "/", "/metrics/", "/v1/embeddings/"):
        assert send(int4_server.url, "GET", path).status == 404, path
    paths = send(int4_server.url, "GET", "/openapi.json").json["paths"]
    assert set(paths) == {
        "/health",
        "/version",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/models/{model}",
        EMBEDDINGS,
    }


def test_edges_of_http_are_answered(int4_server: Launched) -> None:
    url, plain = int4_server.url, vector(int4_server, "good")
    bom = (Path(__file__).parents[1] / "cases" / "16-http-edges" / "bom.json").read_bytes()
    assert send(url, "POST", EMBEDDINGS, bom, JSON).status == 200
    compressed = send(url, "POST", EMBEDDINGS, gzip.compress(BODY), {**JSON, "Content-Encoding": "gzip"})
    assert equal(np.asarray(compressed.vectors[0]), plain)
    assert len(embed(url, input="good", dimensions=128.0).vectors[0]) == 128
    for path in ("/health", "/version", "/metrics", "/v1/models"):
        head = send(url, "HEAD", path)
        assert (head.status, head.raw) == (200, b"")
    for name in (int4_server.model, f"{int4_server.model}-query"):
        model = send(url, "GET", f"/v1/models/{name}").json
        assert (model["id"], model["object"]) == (name, "model")
    query = vector(int4_server, "good", prompt_name="query")
    assert not equal(query, plain)
    assert equal(vector(int4_server, "good", model=f"{int4_server.model}-query"), query)
    assert equal(vector(int4_server, "good", model=f"{int4_server.model}-document"), plain)
    assert equal(vector(int4_server, "good", input_type="search_query"), query)
    version = send(url, "GET", "/version").json
    assert version["version"]
    assert version["qembed"] == installation.version()
    assert metric(url, "qembed_build_info") == 1
    response = send(url, "POST", EMBEDDINGS, BODY, {**JSON, "X-Request-Id": "mine-1"})
    assert (response.status, response.headers["x-request-id"]) == (200, "mine-1")
    assert equal(vector(int4_server, "good", prompt_name=""), plain)


def test_an_idle_connection_stays_open_longer_than_common_proxies_keep_it(
    int4_server: Launched, idle_connection: tuple[socket.socket, float]
) -> None:
    environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in int4_server.started()]
    assert any(b"VLLM_HTTP_TIMEOUT_KEEP_ALIVE=75\0" in environment for environment in environments)
    wire, since = idle_connection
    time.sleep(max(0.0, since + 8 - time.monotonic()))  # uvicorn's default is 5 s
    wire.sendall(GET_HEALTH)
    assert b" 200 " in wire.recv(4096)


def test_every_listening_socket_is_on_the_loopback_interface(int4_server: Launched) -> None:
    import psutil

    sockets = [
        connection.laddr
        for pid in [int4_server.process.pid, *int4_server.started()]
        for connection in psutil.Process(pid).net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert urlsplit(int4_server.url).port in {address.port for address in sockets}
    assert {address.ip for address in sockets} <= {"127.0.0.1", "::1"}


def test_metrics_of_qembed_and_vllm_are_served_together(int4_server: Launched) -> None:
    url = int4_server.url
    texts, refused = metric(url, "qembed_texts_total"), metric(url, "qembed_refused_total")
    assert embed(url, input=["one", "two", "three"]).status == 200
    assert embed(url, input="").status == 400
    assert metric(url, "qembed_texts_total") == texts + 3
    assert metric(url, "qembed_refused_total") == refused + 1
    assert metric(url, "qembed_texts_in_flight") == 0
    assert metric(url, "qembed_memory_bytes") > 10**8
    assert metric(url, "vllm:num_requests_running") == 0
    assert metric(url, "qembed_serving") == 1
    assert metric(url, "vllm:request_success_total") > 0


def test_the_plan_is_within_15_percent_of_the_measured_memory(int4_server: Launched) -> None:
    ready = int4_server.ready
    assert sum(ready["plan"].values()) == ready["planned_bytes"]
    assert abs(ready["memory_bytes"] / ready["planned_bytes"] - 1) < 0.15
    assert "most of it in" not in int4_server.err
    assert "measured" in int4_server.err


def test_top_once_prints_json_or_a_table(int4_server: Launched) -> None:
    assert embed(int4_server.url, input=["one", "two"]).status == 200
    result = subprocess.run(
        [*QEMBED, "top", int4_server.url, "--once", "--json"], capture_output=True, text=True, timeout=60, check=True
    )
    numbers = json.loads(result.stdout)
    assert numbers["memory_bytes"] > 10**8
    assert numbers["planned_bytes"] == int4_server.ready["planned_bytes"]
    assert numbers["requests"]["200"] >= 1
    assert numbers["latency"]["p50"] > 0
    assert (numbers["running"], numbers["waiting"], numbers["restarts"]) == (0, 0, 0)
    table = subprocess.run([*QEMBED, "top", int4_server.url, "--once"], capture_output=True, text=True, timeout=60, check=True)
    assert all(word in table.stdout for word in ("memory", "cache", "tokens/s", "p99"))
