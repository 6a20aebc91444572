"""Connections to the server: how many there may be, and how long a client may take.

uvicorn closes a connection that is idle after an answer, and no other. Here each connection is looked at once a second, so
that requests bear no cost of it, and ended when it

- has not sent a whole header `client_timeout` seconds after it was opened, or after the header's first byte;
- does not send the rest of a body that nobody waits for;
- does not take CHUNK bytes of an answer in that time;
- is idle for longer than the keep-alive.

The gate waits for bodies itself, and then answers 408. When there are too many connections, a new one takes the place of one
that has no request. If all have one, some surplus connections may still ask for /health and /metrics. Looking for such a
connection costs time for each that is open, so several are ended at once, and where there was none, nobody looks again for a
moment: a flood of new connections must not keep the event loop busy.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import resource
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import h11
import uvicorn.config
from uvicorn.protocols.http.h11_impl import H11Protocol

from qembed.serve.gate import asgi

INTERVAL = 1.0  # seconds
CHUNK = 2**16  # bytes
SURPLUS = 16
"""Connections beyond the limit that may ask for /health and /metrics, such as those of the watchdog."""
SHARE = 8
"""With too many connections, one in this many is ended at a time."""
SPARE_FILES = 32
"""Descriptors that are left for other uses of the process."""
USED_FILES = 128  # where /proc does not tell
DESCRIPTORS = 2**16  # where there is no limit
MIN_CONNECTIONS = 4
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
Stage = tuple[str, int]


class Connection(H11Protocol):
    """uvicorn's protocol with limits. Times are in seconds."""

    limit: ClassVar[int] = 1024
    client_timeout: ClassVar[float] = 30.0
    leaving: ClassVar[set[Connection]] = set()
    """Connections that were ended for others, and whose end the event loop has not seen yet."""
    look_again: ClassVar[float] = 0.0
    """The time before which a full server does not look for connections to end."""
    _stage: Stage = ("head", 0)
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or end another for it, or refuse it."""
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) == 1:
            type(self).limit = min(self.limit, room())
            self.loop.call_later(INTERVAL, self._look_at_all)
        if len(self.connections) - len(self.leaving) <= self.limit or self._make_room():
            return
        if len(self.connections) - len(self.leaving) > self.limit + SURPLUS:
            transport.write(FULL)
            transport.close()
        else:
            self.app_state = {**self.app_state, asgi.SURPLUS: True}

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.leaving.discard(self)
        super().connection_lost(exc)

    def _make_room(self) -> bool:
        """End the oldest connections with a half header, or else the oldest idle ones: one in SHARE of the limit at once."""
        now = self.loop.time()
        if now < type(self).look_again:
            return False
        waiting = [other for other in _ours(self.connections) if other is not self and other.is_waiting]
        half = [other for other in waiting if other.stage()[0] == "head"]
        if not waiting:
            type(self).look_again = now + INTERVAL / 10
        for other in heapq.nsmallest(max(1, self.limit // SHARE), half or waiting, key=lambda other: other._since):
            self.leaving.add(other)
            other.transport.abort()
        return bool(waiting)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. Where an answer has begun, only close: h11 sends no second one, and raises instead."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    @property
    def is_waiting(self) -> bool:
        """Whether it is open and has no request that is being answered."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def stage(self) -> Stage:
        """What the connection waits for, with a number that changes with each progress."""
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            return "send", unsent // CHUNK
        if not self.is_waiting:
            return "closing" if self.transport.is_closing() else "answer", id(self.cycle)
        if self.conn.their_state is not h11.IDLE:
            return "rest", id(self.cycle)
        return "head" if self.cycle is None or self.conn.trailing_data[0] else "idle", id(self.cycle)

    def check(self, now: float) -> None:
        """End the connection if it has been too long in its stage; `now` is the event loop's time."""
        stage = self.stage()
        if stage != self._stage:
            self._stage, self._since = stage, now
            return
        name = stage[0]
        limit = self.timeout_keep_alive + INTERVAL if name == "idle" else self.client_timeout
        if name == "answer" or now - self._since < limit:
            return
        if name == "head" and self.conn.trailing_data[0]:
            self.transport.write(TIMED_OUT)
            self.transport.close()
        else:
            self.transport.abort()

    def _look_at_all(self) -> None:
        now = self.loop.time()
        for connection in _ours(list(self.connections)):
            connection.check(now)
        if self.connections:
            self.loop.call_later(INTERVAL, self._look_at_all)


def install(max_connections: int, client_timeout: float) -> None:
    """Let uvicorn use `Connection`, with at most `max_connections`, or as many as the process has descriptors for."""
    Connection.limit = max_connections
    Connection.client_timeout = client_timeout
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"


def room() -> int:
    """How many connections this process has descriptors for, besides those in use. Raises their limit if the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    used = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else USED_FILES
    return max(MIN_CONNECTIONS, (DESCRIPTORS if soft == resource.RLIM_INFINITY else soft) - used - SURPLUS - SPARE_FILES)


def _ours(connections: Iterable[Any]) -> list[Connection]:
    return [cast(Connection, connection) for connection in connections]
