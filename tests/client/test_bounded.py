"""Answers of servers that are not trusted are bounded in size and in time."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from qembed.client import bounded, embeddings, http
from qembed.embed import servers
from qembed.errors import BadInput, QembedError

ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
"""The head of an answer that lasts as long as its connection."""


@contextmanager
def answering_with(send: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server that answers each request by calling `send` with its connection, until that raises OSError."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(2**16)
            send(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def whole(body: bytes, *headers: str, status: str = "200 OK") -> Callable[[socket.socket], None]:
    """Sends one answer."""
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers, "", ""]
    return lambda connection: connection.sendall("\r\n".join(lines).encode() + body)


def without_end(connection: socket.socket) -> None:
    connection.sendall(ENDLESS)
    while True:
        connection.sendall(b" " * 2**16)


def dripping(connection: socket.socket) -> None:
    connection.sendall(ENDLESS)
    while True:
        connection.sendall(b" ")
        time.sleep(0.02)


ANSWER = json.dumps({"object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]})
COMPRESSED = gzip.compress(ANSWER.encode())


def embed(url: str, timeout: float = 30.0) -> object:
    return embeddings.embed(["text"], url=url, model="m", fields={}, timeout=timeout)


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LARGEST_ANSWER", 2**20)
    with answering_with(without_end) as url:
        with pytest.raises(QembedError, match="larger than 1 MiB"):
            embed(url)
        with pytest.raises(BadInput, match="larger than 1 MiB"):
            embeddings.served(url)
        with pytest.raises(QembedError, match="larger than 1 MiB"), servers.opened({url: "m"}, None, False, 30.0, print):
            pass


def test_an_answer_at_the_limit_and_one_byte_above(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering_with(whole(ANSWER.encode())) as url:
        monkeypatch.setattr(bounded, "LARGEST_ANSWER", len(ANSWER))
        assert embed(url).shape == (1, 2)  # type: ignore[attr-defined]
        monkeypatch.setattr(bounded, "LARGEST_ANSWER", len(ANSWER) - 1)
        with pytest.raises(QembedError, match="larger than"):
            embed(url)


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip, gzip", "br"])
def test_a_compressed_answer_is_not_unpacked(encoding: str) -> None:
    with (
        answering_with(whole(COMPRESSED, f"Content-Encoding: {encoding}")) as url,
        pytest.raises(QembedError, match="compressed"),
    ):
        embed(url)


def test_no_compression_is_asked_for() -> None:
    heads = []

    def send(connection: socket.socket) -> None:
        whole(ANSWER.encode())(connection)

    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            heads.append(connection.recv(2**16).lower())
            send(connection)

    threading.Thread(target=serve, daemon=True).start()
    embed(f"http://127.0.0.1:{listener.getsockname()[1]}")
    listener.close()
    assert b"accept-encoding: identity\r\n" in heads[0]


def test_an_answer_that_comes_a_byte_at_a_time() -> None:
    with answering_with(dripping) as url:
        with pytest.raises(QembedError, match=r"no answer within 0\.2 s"):
            embed(url, 0.2)
        with pytest.raises(TimeoutError):
            http.request(url, timeout=0.2, largest=2**20)


def test_texts_do_not_follow_a_redirect_to_another_host() -> None:
    with answering_with(whole(ANSWER.encode())) as other:
        redirect = whole(b"", f"Location: {other}/v1/embeddings", status="307 Temporary Redirect")
        with answering_with(redirect) as url, pytest.raises(QembedError, match="HTTP status 307"):
            embed(url)
