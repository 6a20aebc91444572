"""Run a command in its own process, and measure its time and its peak memory."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.1


class Failed(Exception):
    """The command ended with a non-zero exit code. The message has the end of its output."""


@dataclass
class Run:
    """Time and memory of a run.

    Attributes:
        seconds: from start to end, imports included.
        peak_bytes: peak resident memory of the process (VmHWM), including mapped file pages.
        lines: its standard error: (seconds since the start, line).
    """

    seconds: float
    peak_bytes: int
    lines: list[tuple[float, str]] = field(default_factory=list)


def run(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str], on_line: Callable[[str], None] = lambda _: None
) -> Run:
    """Run `command` with its output in the file `log`; `on_line` is called with each line of its standard error.

    VmHWM is read from /proc while it runs: it never falls, so only the last tenth of a second can be missed.
    (`resource.getrusage` does not help: a child's ru_maxrss starts with that of its parent.)

    Raises:
        Failed: the exit code is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    lines: list[tuple[float, str]] = []
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.PIPE, text=True, errors="replace", env=dict(environment)
        )

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append((time.monotonic() - start, line.rstrip()))
                file.write(line)
                on_line(line.rstrip())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, _peak(process.pid))
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        seconds = time.monotonic() - start
        reader.join()
    if process.returncode:
        last_lines = " / ".join(line for _, line in lines[-3:])
        raise Failed(f"exit code {process.returncode}: {last_lines} (whole log: {log})")
    return Run(seconds, peak, lines)


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
