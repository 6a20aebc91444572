"""Answers on the server's port while vLLM is being started, for the first time or again: 503, with Retry-After.

The listening socket is ours from beginning to end, and vLLM is handed a copy of it: nobody else can take the port in between,
and a client that comes too early is told so instead of being refused.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import ssl
import threading
import time
from types import TracebackType

POLL = 0.1
PATIENCE = 2.0
AT_ONCE = 64
LARGEST = 2**20
BODY = json.dumps(
    {
        "error": {
            "message": "the engine is being started",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
    }
).encode()
ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nRetry-After: %d\r\n"
    b"Connection: close\r\n\r\n"
)


class Unavailable:
    """Answers on `listener` within its `with` block. `tls` are the certificate's and the key's file, for HTTPS."""

    def __init__(self, listener: socket.socket, tls: tuple[str, str] | None, seconds: int) -> None:
        self._listener = listener
        self._answer = ANSWER % (len(BODY), seconds) + BODY
        self._tls = None
        if tls is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(*tls)
        self._ended = threading.Event()
        self._room = threading.Semaphore(AT_ONCE)
        self._thread = threading.Thread(target=self._accept, name="stand-in", daemon=True)

    def __enter__(self) -> Unavailable:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _accept(self) -> None:
        self._listener.setblocking(False)  # vLLM's copy is the same socket, and may be quicker
        while not self._ended.is_set():
            if not select.select([self._listener], [], [], POLL)[0] or self._ended.is_set():
                continue
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                if self._room.acquire(blocking=False):
                    threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
                else:
                    connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(PATIENCE)
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                wire = stack.enter_context(self._tls.wrap_socket(connection, server_side=True) if self._tls else connection)
                _read(wire)
                wire.sendall(self._answer)
        finally:
            self._room.release()


def _read(wire: socket.socket) -> None:
    """Take in the request: a client that is still sending when it is closed would see no answer."""
    deadline = time.monotonic() + PATIENCE
    got = b""
    wanted: int | None = None
    while time.monotonic() < deadline and len(got) < LARGEST and (wanted is None or len(got) < wanted):
        part = wire.recv(2**16)
        if not part:
            return
        got += part
        head, end, _ = got.partition(b"\r\n\r\n")
        if end and wanted is None:
            told = re.search(rb"\r\ncontent-length:\s*(\d{1,12})\s*(?:\r\n|$)", head.lower())
            wanted = len(head) + len(end) + (int(told[1]) if told else 0)
