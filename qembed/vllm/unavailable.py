"""Answers 503 with Retry-After on the server's port while vLLM starts or restarts.

qembed owns the listening socket and gives vLLM a copy. So no other process can take the port during a restart, and early
clients get an answer instead of a refused connection.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import select
import socket
import ssl
import threading
import time
from types import TracebackType

POLL = 0.1
CLIENT_TIMEOUT = 2.0  # seconds
MAX_CONNECTIONS = 64
MAX_REQUEST = 2**20  # bytes
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
    """Answers 503 on `listener` within its `with` block.

    `tls` has the files of certificate and key, for HTTPS; Retry-After is the rest of `seconds`, at least one.
    """

    def __init__(self, listener: socket.socket, tls: tuple[str, str] | None, seconds: int) -> None:
        self._listener = listener
        self._deadline = time.monotonic() + seconds
        self._tls = None
        if tls is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(*tls)
        self._ended = threading.Event()
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._thread = threading.Thread(target=self._accept, name="unavailable", daemon=True)

    def __enter__(self) -> Unavailable:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _accept(self) -> None:
        self._listener.setblocking(False)  # vLLM accepts on the same socket, and may be quicker
        while not self._ended.is_set():
            if not select.select([self._listener], [], [], POLL)[0] or self._ended.is_set():
                continue
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                if self._slots.acquire(blocking=False):
                    threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
                else:
                    connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(CLIENT_TIMEOUT)
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                stream = stack.enter_context(self._tls.wrap_socket(connection, server_side=True) if self._tls else connection)
                _read(stream)
                left = max(1, math.ceil(self._deadline - time.monotonic()))
                stream.sendall(ANSWER % (len(BODY), left) + BODY)
        finally:
            self._slots.release()


def _read(stream: socket.socket) -> None:
    """Read the request to its end: a client that is still sending when the connection closes would not see the answer."""
    deadline = time.monotonic() + CLIENT_TIMEOUT
    received = b""
    size: int | None = None
    while time.monotonic() < deadline and len(received) < MAX_REQUEST and (size is None or len(received) < size):
        chunk = stream.recv(2**16)
        if not chunk:
            return
        received += chunk
        head, separator, _ = received.partition(b"\r\n\r\n")
        if separator and size is None:
            length = re.search(rb"\r\ncontent-length:\s*(\d{1,12})\s*(?:\r\n|$)", head.lower())
            size = len(head) + len(separator) + (int(length[1]) if length else 0)
