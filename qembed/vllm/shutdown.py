"""Ending vLLM with all processes that it started: they are in the session that it leads."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

from qembed.vllm import machine

KILL_GRACE = 5.0
ANSWER_GRACE = 20.0


def stop(process: subprocess.Popen[bytes], drained: bool, grace: float) -> None:
    """End the session of `process`: after `grace` seconds SIGKILL ends all processes that are left.

    Its leader gets SIGTERM first, unless it was told to drain (`drained`) and so ends by itself. A second Ctrl-C skips the
    wait.
    """
    shared = machine.shared_memory(process.pid)
    try:
        if not drained:
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + KILL_GRACE
        while machine.processes(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        for path in shared:
            path.unlink(missing_ok=True)
        if process.stdin:
            process.stdin.close()


def end_hung(process: subprocess.Popen[bytes], *, answers: bool) -> None:
    """Kill a server that hangs.

    If its leader still `answers`, the other processes are killed first: the leader then fails the waiting requests and ends.
    """
    shared = machine.shared_memory(process.pid)
    others = [pid for pid in machine.processes(process.pid) if pid != process.pid]
    for pid in others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if answers and others:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ANSWER_GRACE)
    if process.poll() is None:
        process.kill()
        process.wait()
    for path in shared:
        path.unlink(missing_ok=True)


def exit_in_words(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "no answer, and nothing in its log says why"
    if code == -signal.SIGKILL:
        return "it was killed (signal 9), as the system does when memory runs out"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}, and nothing in its log says why"
