"""Addresses that are not those of a Ray cluster."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from qembed.embed import ray_cluster
from qembed.embed.ray_cluster import Share
from qembed.errors import QembedError
from qembed.vllm import ports

from .conftest import start

pytest.importorskip("ray")
pytestmark = pytest.mark.ray


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "in.txt"
    path.write_text("a text\n")
    return path


def test_an_address_without_a_cluster_fails_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{ports.free('127.0.0.1')}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    for address_option in (address, f"ray://{address}", "auto"):
        process = start(source, "-o", tmp_path / "out.parquet", "--ray", address_option)
        _, err = process.communicate(timeout=60)  # Ray itself retries for a quarter of an hour
        assert process.returncode == 1
        where = address if address_option == "auto" else address_option
        assert f"qembed: --ray {address_option}: no Ray cluster there ({where}: ".encode() in err
    assert not list(tmp_path.iterdir())


@contextmanager
def server_answering(answer: bytes) -> Iterator[str]:
    """The address of a server that sends `answer` to each client, and then nothing until the client disconnects."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(answer)
            with suppress(ConnectionError):
                while self.request.recv(1024):
                    pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220"])
def test_an_address_of_another_server_fails_at_once(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 0.5)
    why = "timed out" if len(answer) < len(ray_cluster.SETTINGS) else "the server there is not Ray"
    with server_answering(answer) as address, pytest.raises(QembedError) as error, ray_cluster.connected(Share(address)):
        pass
    assert str(error.value) == f"--ray {address}: no Ray cluster there ({address}: {why})"


def test_a_missing_token_is_reported(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    with server_answering(ray_cluster.SETTINGS) as address:
        process = start(source, "-o", tmp_path / "out.parquet", "--ray", address)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"no Ray cluster there (Token authentication is enabled but no authentication token was found" in err
