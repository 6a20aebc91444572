"""Runs `qembed embed` on the stand-in in forked children that kill themselves: `python -m tests.embed.victim`.

A request, one JSON object a line: {"arguments": […], "kill": N}: the child gets SIGKILL right before its Nth step on disk (0:
never), or "signal" before it. The answer is {"code": exit status, "steps": [their names], "stderr": text}. {"shell": command}
runs a command instead. Forking saves the imports.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "truncate"),
    (Path, "replace"),
    (Path, "unlink"),
    (shutil, "rmtree"),
)


def main() -> None:
    """Answer requests until the input ends."""
    import pyarrow.parquet  # noqa: F401 - imported once for all children

    from qembed.embed import cli, run
    from tests.embed import standin

    assert cli
    assert run
    standin.install()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        request = json.loads(line)
        if "shell" in request:
            answer: dict[str, Any] = {"code": subprocess.run(request["shell"], shell=True, stdout=sys.stderr).returncode}
        else:
            answer = fork(request["arguments"], request.get("kill", 0), request.get("signal", signal.SIGKILL))
        print(json.dumps(answer), flush=True)


def fork(arguments: list[str], kill: int, number: int) -> dict[str, Any]:
    """Run the command in a child and tell how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        steps, errors = Path(folder, "steps"), Path(folder, "errors")
        child = os.fork()
        if child == 0:
            end = 99
            try:
                descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                end = embed(arguments, kill, number, steps)
            finally:
                sys.stderr.flush()
                os._exit(end)
        _, status = os.waitpid(child, 0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "steps": steps.read_text().splitlines() if steps.exists() else [],
            "stderr": errors.read_text(),
        }


def embed(arguments: list[str], kill: int, number: int, steps: Path) -> int:
    """The command itself, each step on disk noted before it is taken, and the one with number `kill` never taken."""
    from qembed.cli import group

    lock = threading.Lock()  # windows are written by a thread of their own
    count = 0
    log = steps.open("a")

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                log.write(f"{name} {getattr(given[0], 'name', '')}\n")
                log.flush()
                if count == kill:
                    os.kill(os.getpid(), number)
            return function(*given, **options)

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, watch(name, getattr(owner, name)))
    try:
        group.main(["embed", *arguments], prog_name="qembed")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    main()
