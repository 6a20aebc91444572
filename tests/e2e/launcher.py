"""Runs `qembed serve` as a user does: a process that gets signals, with its standard output and standard error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from qembed.vllm import machine

QEMBED = [shutil.which("qembed", path=str(Path(sys.executable).parent)) or "qembed"]
START_SECONDS = 600
STOP_SECONDS = 90


class Launched:
    """A `qembed serve` with `arguments`. Leaving the block ends it and all processes that it started."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qembed-test-")
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [*QEMBED, "serve", *map(str, arguments)],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
            )
        self._sessions: list[int] = []

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            for pid in self.started():
                os.kill(pid, signal.SIGKILL)
            self._folder.cleanup()

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return self._err.read_text(encoding="utf-8")

    @property
    def ready(self) -> dict[str, Any]:
        """The line that --json prints."""
        line: dict[str, Any] = json.loads(self.out)
        return line

    @property
    def url(self) -> str:
        """Its base URL for an openai client."""
        return str(self.ready["url"])

    @property
    def model(self) -> str:
        """The model name that it serves."""
        return str(self.ready["model"])

    def started(self) -> list[int]:
        """Living processes of the sessions that it opened for vLLM, even after qembed itself has ended."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent, _, session = stat.read_text().rpartition(")")[2].split()[1:4]
            except (OSError, ValueError):
                continue
            if int(parent) == self.process.pid and session == stat.parent.name:
                self._sessions.append(int(session))
        return [pid for session in set(self._sessions) for pid in machine.processes(session)]

    def shared_memory(self) -> set[Path]:
        """The files in /dev/shm that vLLM uses."""
        self.started()
        return {path for session in set(self._sessions) for path in machine.shared_memory(session)}

    def wait_ready(self) -> None:
        """Wait for the line that --json prints when the server is ready."""
        self._until(lambda: self.out.endswith("\n"), "ready")
        assert '"error"' not in self.out, self.err

    def wait_stage(self, words: str) -> list[int]:
        """Wait until `words` appear on standard error; returns vLLM's processes at that time."""
        self._until(lambda: words in self.err, words)
        return self.started()

    def signal(self, number: int) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.started()
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)

    def _until(self, reached: Callable[[], bool], state: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not reached():
            assert self.process.poll() is None, f"exit code {self.process.returncode} before {state}: {self.err}"
            assert time.monotonic() < deadline, f"not {state} after {START_SECONDS} s: {self.err}"
            time.sleep(0.2)


def all_gone(pids: list[int], seconds: float = STOP_SECONDS) -> bool:
    """Whether all of `pids` end within `seconds`."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
