"""What the workers of `child.process` have in common: limits of their own, requests on stdin, answers on stdout."""

from __future__ import annotations

import os
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

REQUEST = struct.Struct("<8sQQ")
"""Kind, bytes of the content, seconds of computing time."""
ANSWER = struct.Struct("<cQ")
"""Status and bytes of the rest."""
READY, NO_MEMORY = b"R", b"E"
"""Statuses that every worker has."""

Request = tuple[str, bytes]
Respond = Callable[[bytes, bytes], None]


def requests() -> Iterator[tuple[Request, Respond]]:
    """Kind and content of each request until stdin ends, and the function that answers it with a status and a rest.

    The first command line argument is the largest size of the address space in bytes. No file can be written.
    """
    _limit(resource.RLIMIT_AS, int(sys.argv[1]))
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    def respond(status: bytes, rest: bytes) -> None:
        _answer(out, status, rest)

    respond(READY, b"")
    while head := source.read(REQUEST.size):
        kind, size, seconds = REQUEST.unpack(head)
        content = source.read(size)
        if len(content) < size:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 1 + seconds)
        yield (kind.rstrip(b"\0").decode(), content), respond


def _answer(out: BinaryIO, status: bytes, rest: bytes) -> None:
    out.write(ANSWER.pack(status, len(rest)))
    out.write(rest)
    out.flush()


def _limit(what: int, value: int) -> None:
    """Lower a limit of this process; one that is lower already stays."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
