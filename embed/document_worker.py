"""The process that parses documents, for `document_process`: takes one after the other on stdin, answers on stdout.

It writes no files, and its memory and computing time are limited, so a hostile document ends this process and nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from typing import BinaryIO

REQUEST = struct.Struct("<8sQQ")
"""Kind, bytes of the document, seconds of computing time."""
ANSWER = struct.Struct("<cQ")
"""Status and bytes of the rest."""
READY, TEXT, NOT_READABLE, MISSING, NO_MEMORY = b"R", b"T", b"N", b"M", b"E"


def main() -> None:
    """Answer requests until stdin ends. The only argument is the largest size of the address space in bytes."""
    from qembed.embed import documents

    _limit(resource.RLIMIT_AS, int(sys.argv[1]))
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _answer(out, READY, b"")
    while head := source.read(REQUEST.size):
        kind, size, seconds = REQUEST.unpack(head)
        content = source.read(size)
        if len(content) < size:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 1 + seconds)
        try:
            document = documents.parse(content, kind.rstrip(b"\0").decode())
            answer = TEXT, json.dumps([document.text, document.pages], ensure_ascii=False).encode(errors="surrogatepass")
        except documents.NotReadable as error:
            answer = NOT_READABLE, str(error).encode(errors="replace")
        except ModuleNotFoundError as error:
            answer = MISSING, str(error.name).encode()
        except MemoryError:
            answer = NO_MEMORY, b""
        del content
        _answer(out, *answer)


def _answer(out: BinaryIO, status: bytes, rest: bytes) -> None:
    out.write(ANSWER.pack(status, len(rest)))
    out.write(rest)
    out.flush()


def _limit(what: int, value: int) -> None:
    """Lower a limit of this process; one that is lower already stays."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
