"""Reads documents in another process, which can be ended (`qembed.child`).

One process (`document_worker`) parses them all; a document that exceeds its limits is not readable, and the next one gets a new
process.
"""

from __future__ import annotations

import atexit
import json
import os
import threading

from qembed.child.process import Process, TooMuch
from qembed.embed.document_worker import MISSING, NOT_READABLE, TEXT

MEMORY = 2**31
"""Bytes of the address space of the process."""
SECONDS = {".pdf": 60, ".docx": 60}
"""Computing time that a document may take, and for each of its MiB:"""
SECONDS_OF_OTHERS, SECONDS_PER_MIB = 10, 10
PATIENCE = 5.0
"""Times the computing time that may pass on the clock."""


class Missing(Exception):
    """A library is not installed; the message is its name."""


class Refused(Exception):
    """The parser says why it cannot read a document."""


def read(content: bytes, kind: str) -> tuple[str, list[int]]:
    """The text of a document and the offsets of its pages; `kind` is its suffix.

    Raises:
        TooMuch: it takes too much memory or time, or its parser crashes.
        Refused: it is damaged, encrypted or too large.
        Missing: the library for this kind is not installed.
        QembedError: no process can be started.
    """
    global _process
    seconds = SECONDS.get(kind, SECONDS_OF_OTHERS) + SECONDS_PER_MIB * len(content) // 2**20
    with _lock:
        if _process is None or not _process.is_usable(MEMORY):
            close()
            _process = Process("qembed.embed.document_worker", MEMORY, PATIENCE, "reads documents")
        _process.patience = PATIENCE
        try:
            status, rest = _process.ask(kind, content, seconds)
            if status not in (TEXT, NOT_READABLE, MISSING):
                raise TooMuch("its parser crashes")
        except BaseException:
            close()
            raise
    if status == MISSING:
        raise Missing(rest.decode())
    if status == NOT_READABLE:
        raise Refused(rest.decode())
    text, pages = json.loads(rest.decode(errors="surrogatepass"))
    return text, pages


def close() -> None:
    """End the process, if there is one."""
    global _process
    if _process is not None and _process.owner == os.getpid():
        _process.end()
    _process = None


_lock = threading.RLock()
_process: Process | None = None
atexit.register(close)
