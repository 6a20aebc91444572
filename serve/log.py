"""vLLM's log, read for people: what it is doing, and why it died."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO

STAGES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the weights"),
    ("Loading weights took", "preparing the weights"),
    ("KV cache size", "setting up the cache"),
    ("Capturing CUDA graph", "capturing CUDA graphs"),
    ("Starting vLLM server", "opening the port"),
    ("Application startup complete", "answering a first text"),
)
PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s*)?(?:(?:INFO|WARNING|ERROR|CRITICAL|DEBUG) [\d-]+ [\d:]+ \[[^\]]*\]\s?)?")
FAILURE = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception)\b(?:: .+)?$")
CONSEQUENCES = ("Engine core initialization failed", "WorkerProc initialization failed", "Engine core proc", "EngineDeadError")
REFUSED = re.compile(r"^(?:Value|Assertion) error, (.+?)(?:\. Must be one of \[.*)?$")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Log:
    """A log file that another process is writing to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = path.open(encoding="utf-8", errors="replace")
        self._rest = ""

    def new_lines(self) -> list[str]:
        """The whole lines written since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        return lines

    def close(self) -> None:
        """Close the file; it stays on disk."""
        self._file.close()


def stage(line: str) -> str | None:
    """What vLLM has begun to do when it writes `line`; None if the line does not say."""
    return next((doing for marker, doing in STAGES if marker in line), None)


def cause(lines: Iterable[str]) -> str | None:
    """The exception that ended vLLM, in one line, out of its log; None if there is none.

    The parent processes report that a child failed, after the child has told why; those reports are passed over. Of an option
    that vLLM refuses (pydantic's ValidationError) the reason stands in a line of its own; the list of what it knows is cut.
    """
    found = None
    for line in lines:
        text = plain(line)
        if found and "ValidationError" in found and (refused := REFUSED.match(text)):
            found = refused[1]
        elif FAILURE.match(text) and not any(consequence in text for consequence in CONSEQUENCES):
            found = text
    return found


def plain(line: str) -> str:
    """`line` without colours and without vLLM's process, level, time and place."""
    return PREFIX.sub("", COLOUR.sub("", line)).strip()
