"""Starts a worker process with limits of memory and of computing time, and asks it.

A small file can be made to unpack to gigabytes or to keep its parser busy for days. The worker ends at its limits, and nothing
else does. Computing time does not depend on what else the machine does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import qembed
from qembed.child.worker import ANSWER, NO_MEMORY, REQUEST
from qembed.errors import QembedError

STARTING = 120.0
"""Seconds in which the process starts."""
STEP = 2**20


class TooMuch(Exception):
    """What is read exceeds a limit, or crashes its parser; the message says which."""


class Process:
    """A running worker; `owner` is the process that started it.

    Args:
        module: the worker's; its main() takes `worker.requests`.
        memory: bytes of its address space.
        patience: times the computing time of a request that may pass on the clock.
        purpose: "reads documents", for messages.
        environment: variables beside this process's own.

    Raises:
        QembedError: it does not start.
    """

    def __init__(
        self, module: str, memory: int, patience: float, purpose: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.owner, self.memory, self.patience = os.getpid(), memory, patience
        self._is_asked = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        root = str(Path(qembed.__path__[0]).parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._child = subprocess.Popen(
            # -P: a file of the working directory is no module.
            [sys.executable, "-P", "-m", module, str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C ends the command, which then closes the pipe
        )
        try:
            self._answer(time.monotonic() + STARTING)
        except (TooMuch, TimeoutError) as error:
            self._errors.seek(0)
            messages = self._errors.read().decode(errors="replace").strip().splitlines()
            self.end()
            raise QembedError(f"the process that {purpose} does not start: {messages[-1] if messages else error}") from error

    def is_usable(self, memory: int) -> bool:
        """Whether this process started it, with this limit, and it waits for a request."""
        return self.owner == os.getpid() and self.memory == memory and not self._is_asked and self._child.poll() is None

    def ask(self, kind: str, content: bytes, seconds: int) -> tuple[bytes, bytes]:
        """Status and content of the answer. After an exception the process is not usable any more.

        Raises:
            TooMuch: it takes too much memory or time, or the parser crashes.
        """
        assert self._child.stdin is not None
        self._is_asked = True
        try:
            self._child.stdin.write(REQUEST.pack(kind.encode(), len(content), seconds))
            self._child.stdin.write(content)
            self._child.stdin.flush()
            status, rest = self._answer(time.monotonic() + self.patience * seconds)
        except TimeoutError:
            raise TooMuch(_too_slow(seconds)) from None
        except (BrokenPipeError, _Ended):
            raise TooMuch(self._ended(seconds)) from None
        if status == NO_MEMORY:
            raise TooMuch(self._too_large())
        self._is_asked = False
        return status, rest

    def end(self) -> None:
        """End the process at once."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _answer(self, deadline: float) -> tuple[bytes, bytes]:
        status, size = ANSWER.unpack(self._received(ANSWER.size, deadline))
        if size > self.memory:
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
            return self._too_large()
        return "its parser crashes" + (f" ({signal.strsignal(-code)})" if code < 0 else "")

    def _too_large(self) -> str:
        return f"takes more than {self.memory >> 20} MiB of memory to read"


class _Ended(TooMuch):
    """The process has ended."""


def _too_slow(seconds: int) -> str:
    return f"takes more than {seconds} s to read"
