"""What the gate's files share about ASGI: types, headers, answers, and a thread for large bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SURPLUS = "qembed_surplus"
"""Set in the state of a request's scope if its connection is beyond the limit."""
THREAD_BYTES = 2**15
"""Larger bodies are processed in a thread, so that other requests are answered meanwhile."""
PIECE = 2**18  # bytes


class Disconnected(Exception):
    """The client closed the connection."""


def header(scope: Scope, name: bytes) -> str | None:
    """The first header called `name` (lower case) of a request; None if there is none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), None)


async def maybe_threaded(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, in a thread if the `size` bytes that it processes exceed THREAD_BYTES."""
    return function(*arguments) if size <= THREAD_BYTES else await asyncio.to_thread(function, *arguments)


async def respond(send: Send, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """Send a JSON answer, in pieces: uvicorn holds one until the client has taken the ones before it."""
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )
    for start in range(0, max(1, len(body)), PIECE):
        end = start + PIECE
        await send({"type": "http.response.body", "body": body[start:end], "more_body": end < len(body)})


async def collect(app: App, scope: Scope, receive: Receive) -> tuple[int, bytes]:
    """Status and body of `app`'s answer; status 0 if it sent none. An exception after the answer began is ignored."""
    status = 0
    chunks: list[bytes] = []

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        if not status:
            raise
    return status, b"".join(chunks)
