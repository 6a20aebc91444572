"""Run a command in a process of its own, and tell how long it took and how much memory it held at most."""

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
    """The command ended with another exit code than 0. The message has the end of its output."""


@dataclass
class Run:
    """What one run cost.

    Attributes:
        seconds: from start to end, imports included.
        peak_bytes: the greatest resident memory of the process (VmHWM), file pages that it maps included.
        lines: what it printed to its error stream, each line with the seconds since the start.
    """

    seconds: float
    peak_bytes: int
    lines: list[tuple[float, str]] = field(default_factory=list)


def run(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str], on_line: Callable[[str], None] = lambda _: None
) -> Run:
    """Run `command`, whose output goes into the file `log`; `on_line` hears each line of its error stream.

    VmHWM is read from /proc while it runs: it never falls, so at most what happens in the last tenth of a second is missed.
    (`resource.getrusage` would not do: a child's ru_maxrss begins with that of the process which started it.)

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
        said = " / ".join(line for _, line in lines[-3:])
        raise Failed(f"exit code {process.returncode}: {said} (all of it in {log})")
    return Run(seconds, peak, lines)


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
