"""What answers while vLLM is being started."""

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
    said = answer.status, answer.read(), answer.headers["retry-after"]
    connection.close()
    return said


def test_every_request_gets_503_and_when_to_come_again() -> None:
    with ports.listen("127.0.0.1", 0) as listener, Unavailable(listener, None, 25):
        port = listener.getsockname()[1]
        for method, path, body in (("GET", "/health", None), ("POST", "/v1/embeddings", b"x" * 300_000)):
            status, said, wait = ask(port, method, path, body)
            assert (status, wait) == (503, "25")
            assert json.loads(said)["error"]["message"] == "the engine is being started"


def test_a_silent_client_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unavailable, "PATIENCE", 60.0)  # longer than the client below waits
    with ports.listen("127.0.0.1", 0) as listener, Unavailable(listener, None, 25):
        port = listener.getsockname()[1]
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        assert ask(port, "GET", "/health")[0] == 503
        for one in silent:
            one.close()


def test_when_it_ends_another_takes_over_on_the_same_socket() -> None:
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
