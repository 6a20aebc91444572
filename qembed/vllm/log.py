"""vLLM's log, read for people: what it is doing, and why it died."""

from __future__ import annotations

import json
import os
import re
import sys
import time
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
LEVEL = re.compile(r"\b(INFO|WARNING|ERROR|CRITICAL|DEBUG)\b")
WEIGHTS = re.compile(r"Model loading took ([\d.]+) GiB")
GRAPHS = re.compile(r"Graph capturing finished in .*took (-?[\d.]+) GiB")
REFUSED_OPTION = re.compile(r"^\S+: error: (.+)$")
LONGEST = 16 * 2**20
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Log:
    """A log file that another process is writing to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = path.open(encoding="utf-8", errors="replace")
        self._rest = ""

    def new_lines(self) -> list[str]:
        """The whole lines written since the last call.

        What has been read is cut off once it is long: a server runs for months.
        """
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        if self._file.tell() > LONGEST:
            os.truncate(self.path, 0)
            self._file.seek(0)
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
        elif option := REFUSED_OPTION.match(text):
            found = option[1]
        elif FAILURE.match(text) and not any(consequence in text for consequence in CONSEQUENCES):
            found = text
    return found


def memory(lines: Iterable[str]) -> dict[str, int]:
    """What vLLM tells of a GPU's memory when it starts: bytes of "weights" and "graphs"."""
    found = {}
    for line in lines:
        for name, pattern in (("weights", WEIGHTS), ("graphs", GRAPHS)):
            if (told := pattern.search(line)) is not None:
                found[name] = max(0, int(float(told[1]) * 2**30))
    return found


def show(line: str, style: str, **fields: object) -> None:
    """Write a line of vLLM's log to stderr: as it is, or in style "json" as an object, as `event` does."""
    if style != "json":
        sys.stderr.write(line + "\n")
    elif text := plain(line):
        level = LEVEL.search(COLOUR.sub("", line)[:80])
        event(text, level[1].lower() if level else "info", source="vllm", **fields)


def event(message: str, level: str = "info", **fields: object) -> None:
    """Write something that happened to stderr, as one JSON object: time (UTC), level, message, and `fields`."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    sys.stderr.write(json.dumps({"time": stamp, "level": level, "message": message, **fields}, ensure_ascii=False) + "\n")
    sys.stderr.flush()


def plain(line: str) -> str:
    """`line` without colours and without vLLM's process, level, time and place."""
    return PREFIX.sub("", COLOUR.sub("", line)).strip()
