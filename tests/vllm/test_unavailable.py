"""The 503 that the port answers while vLLM starts."""

from __future__ import annotations

import http.client
import json
import socket
import threading

import pytest

from qembed.vllm import ports, unavailable
from qembed.vllm.unavailable import Unavailable


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body)
    answer = connection.getresponse()
    result = answer.status, answer.read(), answer.headers["retry-after"]
    connection.close()
    return result


def test_every_request_gets_503_with_retry_after() -> None:
    with ports.listen("127.0.0.1", 0) as listener, Unavailable(listener, None, 25):
        port = listener.getsockname()[1]
        for method, path, body in (("GET", "/health", None), ("POST", "/v1/embeddings", b"x" * 300_000)):
            status, answer, wait = ask(port, method, path, body)
            assert (status, wait) == (503, "25")
            assert json.loads(answer)["error"]["message"] == "the engine is being started"


def test_retry_after_is_the_remaining_time_of_the_start() -> None:
    for passed, left in ((20.5, "5"), (100, "1")):
        with ports.listen("127.0.0.1", 0) as listener, Unavailable(listener, None, 25) as answering:
            answering._deadline -= passed
            assert ask(listener.getsockname()[1], "GET", "/health")[2] == left


def test_a_silent_client_does_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unavailable, "CLIENT_TIMEOUT", 60.0)  # longer than the client below waits
    with ports.listen("127.0.0.1", 0) as listener, Unavailable(listener, None, 25):
        port = listener.getsockname()[1]
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        assert ask(port, "GET", "/health")[0] == 503
        for connection in silent:
            connection.close()


def test_afterwards_another_process_can_accept_on_the_same_socket() -> None:
    with ports.listen("127.0.0.1", 0) as listener:
        with Unavailable(listener, None, 25):
            assert ask(listener.getsockname()[1], "GET", "/")[0] == 503
        accepted: list[socket.socket] = []
        copy = listener.dup()
        copy.setblocking(True)
        thread = threading.Thread(target=lambda: accepted.append(copy.accept()[0]))
        thread.start()
        socket.create_connection(listener.getsockname()).close()
        thread.join(5)
        assert len(accepted) == 1
        accepted[0].close()
        copy.close()
