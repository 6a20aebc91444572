"""The head of an answer must come within the time of a request, whatever a server sends meanwhile."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest

from qembed.client import about, embeddings, http
from qembed.client.deadline import within
from qembed.errors import QembedError
from tests.client.test_bounded import answering_with

START = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Slow: "


def repeated(first: bytes, again: bytes) -> Callable[[socket.socket], None]:
    """Sends `first`, then `again` without end, more often than any timeout between two bytes."""

    def send(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(again)
            time.sleep(0.02)

    return send


HEADS = {
    "a header byte by byte": repeated(START, b"x"),
    "a status line byte by byte": repeated(b"HTTP/1.1 200 ", b"O"),
    "answers that only announce one": repeated(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "early hints": repeated(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}


@pytest.mark.parametrize("send", HEADS.values(), ids=HEADS)
def test_a_head_without_end(send: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(about, "ASKING_SECONDS", 0.2)
    with answering_with(send) as url:
        with pytest.raises(QembedError, match=r"no answer within 0\.2 s"):
            embeddings.embed(["text"], url=url, model="m", fields={}, timeout=0.2)
        assert about.memory(url) is None


@pytest.mark.parametrize("name", [name for name in HEADS if name != "early hints"])
def test_a_head_without_end_for_the_standard_library(name: str) -> None:
    with answering_with(HEADS[name]) as url, pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        http.request(url, timeout=0.2, largest=2**20)


def test_early_hints_are_an_answer_without_a_body_for_the_standard_library() -> None:
    with answering_with(HEADS["early hints"]) as url:
        assert http.request(url, timeout=0.2) == (103, b"")


def test_an_answer_that_comes_too_late_is_closed() -> None:
    come, closed = threading.Event(), threading.Event()

    class Late:
        def close(self) -> None:
            closed.set()

    def receive() -> Late:
        come.wait()
        return Late()

    with pytest.raises(TimeoutError):
        within(0.01, receive)
    come.set()
    assert closed.wait(10)


def test_errors_are_passed_on() -> None:
    def receive() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        within(10, receive)


def test_a_signal_while_waiting_is_not_taken_for_a_missing_answer() -> None:
    released = threading.Event()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            within(30, released.wait)
    finally:
        signal.signal(signal.SIGALRM, before)
        released.set()
