"""vLLM's log: the stage of its start, why it died, and the memory it reports; and log events of qembed itself."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from qembed.text.display import escaped
from qembed.vllm import gate_rules
from qembed.vllm.internals import CONSEQUENCES, GRAPHS, PREFIX, PROCESS, STAGES, WEIGHTS

FAILURE = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception)\b(?:: .+)?$")
REFUSED = re.compile(r"^(?:Value|Assertion) error, (.+?)(?:\. Must be one of \[.*)?$")
LEVEL = re.compile(r"\b(INFO|WARNING|ERROR|CRITICAL|DEBUG)\b")
REFUSED_OPTION = re.compile(r"^\S+: error: (.+)$")
MAX_BYTES = 16 * 2**20
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Log:
    """A log file that another process is writing to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = path.open(encoding="utf-8", errors="replace")
        self._incomplete = ""

    def new_lines(self) -> list[str]:
        """The complete lines written since the last call.

        A file beyond MAX_BYTES is truncated once it is read, because a server runs for months.
        """
        *lines, self._incomplete = (self._incomplete + self._file.read()).split("\n")
        if self._file.tell() > MAX_BYTES:
            os.truncate(self.path, 0)
            self._file.seek(0)
        return lines

    def close(self) -> None:
        """Close the file; it stays on disk."""
        self._file.close()


def stage(line: str) -> str | None:
    """The stage that begins when vLLM logs `line`; None if none does."""
    return next((name for marker, name in STAGES if marker in line), None)


def cause(lines: Iterable[str]) -> str | None:
    """The exception in vLLM's log that ended it, in one line; None if there is none.

    Parent processes report the failure of a child after the child has logged its cause; such reports are skipped. For an
    option that vLLM refuses (pydantic's ValidationError) the cause is on a line of its own; its list of valid values is cut.
    """
    failure = None
    for line in lines:
        text = plain(line)
        if failure and "ValidationError" in failure and (refused := REFUSED.match(text)):
            failure = refused[1]
        elif option := REFUSED_OPTION.match(text):
            failure = option[1]
        elif FAILURE.match(text) and not any(consequence in text for consequence in CONSEQUENCES):
            failure = text
    return failure


def memory(lines: Iterable[str]) -> dict[str, int]:
    """The GPU memory that vLLM logs when it starts: bytes of "weights" and "graphs"."""
    sizes = {}
    for line in lines:
        for name, pattern in (("weights", WEIGHTS), ("graphs", GRAPHS)):
            if (match := pattern.search(line)) is not None:
                sizes[name] = max(0, int(float(match[1]) * 2**30))
    return sizes


def show(line: str, style: str, **fields: object) -> None:
    """Write a line of vLLM's log to stderr: without colours, or in style "json" as an `event`."""
    if style != "json":
        sys.stderr.write(escaped(COLOUR.sub("", line)) + "\n")
    elif text := plain(line):
        level = LEVEL.search(COLOUR.sub("", line)[:80])
        event(text, level[1].lower() if level else "info", source="vllm", **fields)


OWN = (gate_rules.ACCESS, gate_rules.TEXTS)
"""How the gate's own lines begin."""


def own(line: str) -> str | None:
    """`line` without the process that vLLM names before it, if it is one of the gate's own; otherwise None."""
    bare = PROCESS.sub("", line)
    return bare if bare.startswith(OWN) else None


def access(line: str, style: str) -> None:
    """Write a request, given as a JSON object, to stderr: as an `event` in style "json", else its values in one line."""
    fields = json.loads(line)
    if style == "json":
        event("request", event="request", **fields)
    else:
        sys.stderr.write("request " + " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items()) + "\n")
        sys.stderr.flush()


def event(message: str, level: str = "info", **fields: object) -> None:
    """Write an event to stderr as one JSON object: time (UTC), level, message, and `fields`."""
    sys.stderr.write(event_line(message, level, **fields) + "\n")
    sys.stderr.flush()


def event_line(message: str, level: str = "info", **fields: object) -> str:
    """An event as `event` writes it, without the end of the line."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    return escaped(json.dumps({"time": stamp, "level": level, "message": message, **fields}, ensure_ascii=False))


def plain(line: str) -> str:
    """`line` without colours and without vLLM's prefix of process, level, time and source line."""
    return PREFIX.sub("", COLOUR.sub("", line)).strip()
