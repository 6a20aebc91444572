"""Reads documents in another process, which can be ended.

Documents come from anywhere, and a small one can be made to unpack to gigabytes or to keep its parser busy for days. So one
process (`document_worker`) parses them all, within limits of memory and of computing time; a document that exceeds them is not
readable, and the next one gets a new process. Computing time does not depend on what else the machine does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import qembed
from qembed.embed.document_worker import ANSWER, MISSING, NO_MEMORY, NOT_READABLE, READY, REQUEST, TEXT
from qembed.errors import QembedError

MEMORY = 2**31
"""Bytes of the address space of the process."""
SECONDS = {".pdf": 60, ".docx": 60}
"""Computing time that a document may take, and for each of its MiB:"""
SECONDS_OF_OTHERS, SECONDS_PER_MIB = 10, 10
PATIENCE = 5
"""Times the computing time that may pass on the clock."""
STARTING = 120.0
"""Seconds in which the process starts."""
STEP = 2**20


class TooMuch(Exception):
    """A document exceeds a limit, or crashes its parser; the message says which."""


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
        if _process is None or not _process.is_usable():
            close()
            _process = _Process(MEMORY)
        try:
            status, rest = _process.ask(content, kind, seconds)
        except BaseException:
            close()
            raise
        if status == NO_MEMORY:
            close()
            raise TooMuch(_too_large())
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


class _Process:
    """A running `document_worker`; `owner` is the process that started it."""

    def __init__(self, memory: int) -> None:
        self.owner, self.memory = os.getpid(), memory
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        root = str(Path(qembed.__path__[0]).parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._child = subprocess.Popen(
            # -P: a file of the working directory is no module.
            [sys.executable, "-P", "-m", "qembed.embed.document_worker", str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C ends the command, which then closes the pipe
        )
        try:
            self._answer(time.monotonic() + STARTING, READY)
        except (TooMuch, TimeoutError) as error:
            self._errors.seek(0)
            messages = self._errors.read().decode(errors="replace").strip().splitlines()
            self.end()
            raise QembedError(
                f"the process that reads documents does not start: {messages[-1] if messages else error}"
            ) from error

    def is_usable(self) -> bool:
        """Whether this process started it, with the limit that now holds, and it still runs."""
        return self.owner == os.getpid() and self.memory == MEMORY and self._child.poll() is None

    def ask(self, content: bytes, kind: str, seconds: int) -> tuple[bytes, bytes]:
        """Status and content of the answer."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(REQUEST.pack(kind.encode(), len(content), seconds))
            self._child.stdin.write(content)
            self._child.stdin.flush()
            return self._answer(time.monotonic() + PATIENCE * seconds, TEXT, NOT_READABLE, MISSING, NO_MEMORY)
        except TimeoutError:
            raise TooMuch(_too_slow(seconds)) from None
        except BrokenPipeError:
            raise TooMuch(self._ended(seconds)) from None
        except _Ended:
            raise TooMuch(self._ended(seconds)) from None

    def end(self) -> None:
        """End the process at once."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _answer(self, deadline: float, *expected: bytes) -> tuple[bytes, bytes]:
        status, size = ANSWER.unpack(self._received(ANSWER.size, deadline))
        if status not in expected:
            raise TooMuch("its parser crashes")
        return status, self._received(size, deadline)

    def _received(self, size: int, deadline: float) -> bytes:
        assert self._child.stdout is not None
        stream, parts = self._child.stdout.fileno(), bytearray()
        while len(parts) < size:
            if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(stream, min(STEP, size - len(parts)))
            if not part:
                raise _Ended
            parts += part
        return bytes(parts)

    def _ended(self, seconds: int) -> str:
        """Why the process ended."""
        code = self._child.wait()
        if code == -signal.SIGXCPU:
            return _too_slow(seconds)
        if code == -signal.SIGKILL:
            return _too_large()
        return "its parser crashes" + (f" ({signal.strsignal(-code)})" if code < 0 else "")


class _Ended(TooMuch):
    """The process has ended."""


def _too_slow(seconds: int) -> str:
    return f"takes more than {seconds} s to read"


def _too_large() -> str:
    return f"takes more than {MEMORY >> 20} MiB of memory to read"


_lock = threading.RLock()
_process: _Process | None = None
atexit.register(close)
