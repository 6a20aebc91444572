"""A small HTTP server whose answers come from a function in the test."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """`body` is the request's JSON, {} if it has none."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


Answer = Callable[[Request], tuple[int, object]]
"""Returns the status and the content: bytes as they are, anything else as JSON."""


class Server:
    """Answers at `url` until `end`."""

    def __init__(self, answer: Answer) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, content = answer(Request(self.path, self.headers, json.loads(raw) if raw else {}))
                payload = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def end(self) -> None:
        """Stop answering, on open connections too."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Listener(ThreadingHTTPServer):
    """Remembers its connections."""

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Run a server until the block is left; yields its URL."""
    server = Server(answer)
    try:
        yield server.url
    finally:
        server.end()
