"""Limits of connections, with a real uvicorn around a small app."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import resource
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from qembed.serve import connections
from qembed.serve.connections import CHUNK, SURPLUS, Connection
from qembed.serve.gate import asgi
from qembed.vllm.arguments import MAX_HEADER

SECONDS = 30.0
ANSWER = 32 * 2**20  # bytes: more than the system's buffers hold
HALF = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /slow HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "fields": (HALF, b"a: b\r\n"),
    "the value of a field": (HALF + b"X: ", b"a"),
    "the name of a field": (HALF, b"a"),
    "a path": (b"GET /", b"a"),
    "a method": (b"", b"A"),
    "the head of a chunk": (CHUNKED + b"1;", b"a"),
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n"),
}
"""The beginning of a request, and bytes that may follow it endlessly."""


class App:
    """Answers 200, or 503 on a surplus connection: /slow once `go` is set, /large with ANSWER bytes."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.requests = 0

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.requests += 1
        while scope["path"] == "/slow" and not self.go.is_set():
            await asyncio.sleep(0.01)
        status = 503 if scope["state"].get(asgi.SURPLUS) else 200
        await asgi.respond(send, status, b"x" * (ANSWER if scope["path"] == "/large" else 2))


class Running:
    def __init__(self, app: App, limit: int, client_timeout: float, keep_alive: int) -> None:
        kind = type("Limited", (Connection,), {"limit": limit, "client_timeout": client_timeout, "leaving": set()})
        config = uvicorn.Config(
            app,
            http=kind,
            timeout_keep_alive=keep_alive,
            h11_max_incomplete_event_size=MAX_HEADER,
            log_level="critical",
            lifespan="off",
        )
        self.app, self.server = app, uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def open(self, sent: bytes = b"") -> socket.socket:
        wire = socket.create_connection(self.listener.getsockname(), timeout=SECONDS)
        wire.sendall(sent)
        return wire

    def get(self, path: str = "/") -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.listener.getsockname()[1], timeout=SECONDS)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    monkeypatch.setattr(connections, "INTERVAL", 0.05)
    started: list[Running] = []

    def run(limit: int = 100, client_timeout: float = 0.3, keep_alive: int = 60) -> Running:
        running = Running(App(), limit, client_timeout, keep_alive)
        started.append(running)
        running.thread.start()
        return running

    yield run
    for running in started:
        running.app.go.set()
        running.server.should_exit = running.server.force_exit = True
        running.thread.join(SECONDS)
        running.listener.close()


def received(wire: socket.socket) -> bytes:
    """All bytes that the server sends until it closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := wire.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_connection_that_sends_nothing_is_closed(start: Callable[..., Running]) -> None:
    assert received(start().open()) == b""


def test_a_header_that_does_not_end_is_a_408(start: Callable[..., Running]) -> None:
    running = start()
    assert received(running.open(HALF)).startswith(b"HTTP/1.1 408 ")
    wire = running.open(HALF + b"\r\n" + HALF)  # a second one on the same connection
    assert b" 408 " in received(wire)


def test_a_header_that_comes_byte_by_byte_is_a_408(start: Callable[..., Running]) -> None:
    wire = start().open(HALF)
    wire.settimeout(0.05)
    answer = b""
    deadline = time.monotonic() + SECONDS
    while not answer and time.monotonic() < deadline:
        wire.sendall(b"a")
        with contextlib.suppress(TimeoutError):
            answer = wire.recv(100)
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("name", list(ENDLESS))
def test_a_header_without_end_is_a_400_at_the_limit(start: Callable[..., Running], name: str) -> None:
    beginning, repeated = ENDLESS[name]
    wire = start(client_timeout=60).open(beginning)
    wire.sendall(repeated * (MAX_HEADER // len(repeated) + 1))
    assert received(wire).startswith(b"HTTP/1.1 400 ")


def test_a_header_below_the_limit_is_answered(start: Callable[..., Running]) -> None:
    wire = start(client_timeout=60).open(HALF)
    wire.sendall(b"a: b\r\n" * ((MAX_HEADER - 100) // 6))
    wire.sendall(b"Connection: close\r\n\r\n")
    assert b" 200 " in received(wire)


@pytest.mark.parametrize("name", list(ENDLESS))
def test_a_header_without_end_takes_no_memory(start: Callable[..., Running], name: str) -> None:
    running = start(client_timeout=60)
    beginning, repeated = ENDLESS[name]
    block = repeated * (CHUNK // len(repeated))
    assert running.get() == 200
    sent = 0
    with running.open(beginning) as wire:
        tracemalloc.start()
        try:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                while sent < 64 * 2**20:
                    wire.sendall(block)
                    sent += len(block)
            until(lambda: not running.server.server_state.connections)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert sent < 64 * 2**20
    assert peak < 16 * MAX_HEADER
    assert running.get() == 200


def test_invalid_bytes_after_an_answer_close_the_connection_without_a_traceback(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    wire = start(client_timeout=60).open(CHUNKED.replace(b"/slow", b"/"))
    assert b" 200 " in wire.recv(1000)
    wire.sendall(b"no chunk\r\n")
    assert b"HTTP" not in received(wire)
    assert "Traceback" not in caplog.text


def test_an_unread_rest_of_a_body_does_not_keep_a_connection_open(start: Callable[..., Running]) -> None:
    wire = start().open(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
    assert b" 200 " in received(wire)


def test_an_idle_connection_is_closed_even_if_it_sent_a_line_break(start: Callable[..., Running]) -> None:
    running = start(keep_alive=1)
    wire = running.open(HALF + b"\r\n")
    assert b" 200 " in wire.recv(1000)
    wire.sendall(b"\r\n")
    assert b" 200 " not in received(wire)


def test_a_client_that_does_not_read_is_disconnected(start: Callable[..., Running]) -> None:
    running = start()
    wire = running.open(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
    until(lambda: running.app.requests == 1)
    until(lambda: not running.server.server_state.connections)
    assert len(received(wire)) < ANSWER


def test_a_client_that_reads_slowly_gets_its_answer(start: Callable[..., Running]) -> None:
    wire = start(client_timeout=1).open(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    size = 0
    while part := wire.recv(16 * CHUNK):
        size += len(part)
        time.sleep(0.001)
    assert size > ANSWER


def test_a_request_in_computation_has_no_time_limit(start: Callable[..., Running]) -> None:
    running = start(client_timeout=0.1)
    wire = running.open(b"GET /slow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    time.sleep(0.5)
    running.app.go.set()
    assert b" 200 " in received(wire)


def test_a_new_connection_replaces_a_waiting_one(start: Callable[..., Running]) -> None:
    running = start(limit=4, client_timeout=60)
    idle = running.open(HALF + b"\r\n")
    assert b" 200 " in idle.recv(1000)
    half = [running.open(HALF) for _ in range(20)]
    assert [running.get() for _ in range(5)] == [200] * 5
    assert len(running.server.server_state.connections) <= 5
    idle.sendall(HALF + b"\r\n")  # connections with half a header were closed first
    assert b" 200 " in idle.recv(1000)
    for wire in half:
        wire.close()


def test_if_all_connections_have_a_request_a_few_more_get_a_503_from_the_app(start: Callable[..., Running]) -> None:
    running = start(limit=4, client_timeout=60)
    slow = b"GET /slow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    wires = [running.open(slow) for _ in range(4)]
    until(lambda: running.app.requests == 4)
    assert running.get() == 503
    assert running.app.requests == 5  # the app has answered
    surplus = [running.open(slow) for _ in range(SURPLUS)]
    until(lambda: running.app.requests == 5 + SURPLUS)
    beyond = running.open()
    assert received(beyond).startswith(b"HTTP/1.1 503 ")
    assert running.app.requests == 5 + SURPLUS
    running.app.go.set()
    assert all(b" 200 " in received(wire) for wire in wires)
    assert all(b" 503 " in received(wire) for wire in surplus)


def test_there_are_no_more_connections_than_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert connections.MIN_CONNECTIONS < connections.room() < 256 - SURPLUS
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    assert connections.room() == connections.MIN_CONNECTIONS


def record_examined(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """A list that from now on records each connection that the server examines."""
    examined: list[Connection] = []
    is_waiting = Connection.is_waiting.fget
    assert is_waiting is not None

    def look(self: Connection) -> bool:
        examined.append(self)
        return is_waiting(self)

    monkeypatch.setattr(Connection, "is_waiting", property(look))
    return examined


@pytest.mark.parametrize("request_sent", [HALF, b""])
def test_each_connection_of_a_flood_examines_few_others(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, request_sent: bytes
) -> None:
    monkeypatch.setattr(connections, "INTERVAL", 60.0)
    examined = record_examined(monkeypatch)
    running = start(limit=64, client_timeout=60)
    wires = [running.open(request_sent) for _ in range(400)]
    assert running.get() == 200
    assert len(examined) < 400 * 64 / 4
    for wire in wires:
        wire.close()


def test_a_server_full_of_requests_does_not_examine_them_for_each_connection(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "INTERVAL", 600.0)
    running = start(limit=16, client_timeout=600)
    busy = [running.open(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(16)]
    until(lambda: running.app.requests == 16)
    examined = record_examined(monkeypatch)
    others = [running.open() for _ in range(100)]
    until(lambda: any(received_so_far(wire).startswith(b"HTTP/1.1 503") for wire in others[-20:]))
    assert len(examined) < 16 * 5
    for wire in busy + others:
        wire.close()


def received_so_far(wire: socket.socket) -> bytes:
    """The bytes that the server has sent so far."""
    wire.settimeout(0.05)
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        return wire.recv(2**16)
    return b""
