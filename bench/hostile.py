"""Hostile clients for `make bench-load`: each attack goes on until it is cancelled, and counts how the server ended it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

Address = tuple[str, int]
Attack = Callable[[Address, Counter[str]], Coroutine[Any, Any, None]]

IDLE = 2000
"""More connections than the default --max-connections."""
SLOW = 500
SLOW_BYTES, SLOW_PAUSE = 2**20, 0.5
"""Bytes that a slow body promises, and seconds between two of its bytes."""
LARGE = 8
"""More than fit into four times --max-body."""
LARGE_BYTES = 31 * 2**20
PAUSE = 0.05
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


async def idle(address: Address, endings: Counter[str]) -> None:
    """IDLE connections, half of them with half a header; each that is closed is opened again."""

    async def hold(number: int) -> None:
        async with _connected(address) as wire:
            if number % 2:
                await asyncio.get_running_loop().sock_sendall(wire, HEAD[:40])
            endings[await _answer(wire)] += 1

    await _crowd(IDLE, hold, endings)


async def slow(address: Address, endings: Counter[str]) -> None:
    """SLOW bodies that come byte by byte."""

    async def trickle(_: int) -> None:
        loop = asyncio.get_running_loop()
        async with _connected(address) as wire:
            await loop.sock_sendall(wire, HEAD % SLOW_BYTES)
            answer = asyncio.create_task(_answer(wire))
            try:
                while not answer.done():
                    await loop.sock_sendall(wire, b" ")
                    await asyncio.wait([answer], timeout=SLOW_PAUSE)
                endings[answer.result()] += 1
            finally:
                answer.cancel()

    await _crowd(SLOW, trickle, endings)


async def large(address: Address, endings: Counter[str]) -> None:
    """LARGE bodies at a time, of combining marks, which are the slowest to clean."""
    mark = "a" + "\u0301" * 4095
    text = mark * (LARGE_BYTES // len(mark.encode()))
    request = json.dumps({"input": text}, ensure_ascii=False).encode()
    request = HEAD % len(request) + request

    async def send(_: int) -> None:
        async with _connected(address) as wire:
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(wire, request))
            try:
                endings[await _answer(wire)] += 1
            finally:
                sending.cancel()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await sending

    await _crowd(LARGE, send, endings)


ATTACKS: dict[str, tuple[str, Attack]] = {
    "idle": (f"{IDLE} connections, idle or with half a header", idle),
    "slow": (f"{SLOW} bodies, byte by byte", slow),
    "large": (f"{LARGE} bodies of {LARGE_BYTES // 2**20} MiB at a time", large),
}
"""By name: a description, and the attack."""


@contextlib.asynccontextmanager
async def _connected(address: Address) -> AsyncIterator[socket.socket]:
    with socket.socket() as wire:
        wire.setblocking(False)
        await asyncio.get_running_loop().sock_connect(wire, address)
        yield wire


async def _answer(wire: socket.socket) -> str:
    """Status of the server's answer, or "closed"."""
    head = await asyncio.get_running_loop().sock_recv(wire, 2**16)
    return head.split()[1].decode() if head.startswith(b"HTTP/1.1 ") else "closed"


async def _crowd(size: int, client: Callable[[int], Awaitable[None]], endings: Counter[str]) -> None:
    """`size` clients at a time; each comes again shortly after it was turned away."""

    async def again(number: int) -> None:
        while True:
            try:
                await client(number)
            except OSError:
                endings["reset"] += 1
            await asyncio.sleep(PAUSE)

    async with asyncio.TaskGroup() as group:
        for number in range(size):
            group.create_task(again(number))
