"""Connections that send no complete request, and leftovers of a killed server, with the real vLLM."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.http import embed, send
from tests.e2e.launcher import Launched, all_gone

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("needs_proc")]

FILES = 200
HALF = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: "


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """An empty TMPDIR with a short name."""
    folder = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(checkpoint: Path, temporary: Path) -> Launched:
    server = Launched("--int4", "--model", checkpoint, "--port", 0, "--json", env={"TMPDIR": str(temporary)})
    server.wait_ready()
    return server


def test_neither_the_engine_nor_another_process_outlives_a_killed_launcher_and_server(
    int4_checkpoint: Path, temporary: Path
) -> None:
    with start(int4_checkpoint, temporary) as server:
        assert embed(server.url, input=["a large body"] * 2000, more="x" * 2**20).status == 200  # parsed in one more process
        pids = server.started()
        assert len(pids) >= 3
        assert any(b"Engine" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)
        for pid in (server.process.pid, server.ready["pid"]):
            os.kill(pid, signal.SIGKILL)
        assert all_gone(pids, 30)


def test_open_connections_without_a_request_do_not_block_others(int4_checkpoint: Path, temporary: Path) -> None:
    before = set(temporary.iterdir())
    with start(int4_checkpoint, temporary) as server:
        assert not before & set(temporary.iterdir())  # leftovers of the killed server are removed
        resource.prlimit(server.ready["pid"], resource.RLIMIT_NOFILE, (FILES, FILES))
        where = urlsplit(server.url)
        sockets = [socket.create_connection((where.hostname, where.port)) for _ in range(3 * FILES)]
        for wire in sockets[::2]:
            wire.sendall(HALF)
        assert [send(server.url, "GET", "/health").status for _ in range(5)] == [200] * 5
        assert embed(server.url, input="good").status == 200
        for wire in sockets:
            wire.close()
        shared = server.shared_memory()
        assert server.signal(signal.SIGTERM) == 0
        assert not any(path.exists() for path in shared)
    assert list(temporary.iterdir()) == []
