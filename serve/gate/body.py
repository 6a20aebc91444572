"""The body of a request: read within a limit of bytes and time, and decompressed within the same limit."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Callable

from qembed.serve.gate.asgi import Disconnected, Receive, Scope, header
from qembed.serve.gate.errors import Refused, bad
from qembed.serve.gate.overload import SMALL

WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""zlib's `wbits` by content encoding."""
MAX_RATIO = 1032
"""Deflate makes at most so many bytes from one."""


async def read(scope: Scope, receive: Receive, limit: int, reserve: Callable[[int], None], seconds: float) -> bytes:
    """The body of a request; `reserve` is called with each size before so many bytes are held.

    Raises:
        Refused: 408, it does not arrive within `seconds`; 413, it has more than `limit` bytes, as sent or decompressed; 415,
            it is compressed by a method other than gzip and deflate; 400, it cannot be decompressed.
        Disconnected: the client closed the connection.
    """
    encoding = (header(scope, b"content-encoding") or "identity").strip().lower()
    if encoding != "identity" and encoding not in WINDOWS:
        raise Refused(
            415, "Content-Encoding must be gzip, deflate or identity", "type", None, {"accept-encoding": "gzip, deflate"}
        )
    raw = await _raw(scope, receive, limit, reserve, seconds)
    if encoding == "identity":
        return raw
    if len(raw) <= SMALL:
        with contextlib.suppress(TooLarge):
            return inflate(raw, encoding, min(limit, SMALL))
    reserve(min(limit, MAX_RATIO * len(raw)))
    return await asyncio.to_thread(inflate, raw, encoding, limit)


def inflate(raw: bytes, encoding: str, limit: int) -> bytes:
    """`raw` decompressed; at most `limit` bytes and one more are ever held.

    Raises:
        Refused: 413, there are more than `limit` bytes; 400, it is damaged or not compressed by `encoding`.
    """
    chunks: list[bytes] = []
    size = 0
    try:
        while True:
            window = -15 if encoding == "deflate" and not _has_zlib_header(raw) else WINDOWS[encoding]
            unpacker = zlib.decompressobj(window)
            chunks.append(unpacker.decompress(raw, limit + 1 - size))
            size += len(chunks[-1])
            if size > limit:
                raise TooLarge(limit)
            if not unpacker.eof:
                raise bad("the body ends before its compressed data does", "encoding", None)
            raw = unpacker.unused_data
            if not raw or encoding == "deflate":
                return b"".join(chunks)
    except zlib.error as error:
        raise bad(f"the body is not {encoding}, as Content-Encoding says", "encoding", None) from error


class TooLarge(Refused):
    """413 for a body of more than `limit` bytes."""

    # No "connection: close" here: uvicorn discards the rest of the body as it comes. A client that is still sending would see a
    # reset instead of the answer.
    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the request has more than {limit} bytes (--max-body)", "size", None)


def _has_zlib_header(raw: bytes) -> bool:
    """Whether deflate data have zlib's header, as RFC 9110 wants; some clients send them without (RFC 1950, section 2.2)."""
    return len(raw) >= 2 and raw[0] & 0x0F == 8 and (raw[0] << 8 | raw[1]) % 31 == 0


async def _raw(scope: Scope, receive: Receive, limit: int, reserve: Callable[[int], None], seconds: float) -> bytes:
    length = header(scope, b"content-length") or "0"
    if length.isdecimal() and int(length[:20]) > limit:
        raise TooLarge(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise TooLarge(limit)
                reserve(len(chunk))
                chunks.append(chunk)
                if not message.get("more_body"):
                    return b"".join(chunks)
    except TimeoutError:
        raise Refused(
            408, f"the request was not complete within {seconds:g} s (--client-timeout)", "slow", None, {"connection": "close"}
        ) from None
