"""Runs `qembed quantize` in forked children that kill themselves: `python -m tests.quantize.victim`, one JSON request a line.

A request is {"arguments": [...], "kill": N or name}: the child gets SIGKILL (or "signal": number) right before its Nth step on
disk (0: never), or before the first one called so. The answer is {"code": exit status, "steps": [names of the steps up to
there], "stderr": text}. {"shell": command} runs a command instead.

Forking saves importing torch and transformers for each child.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD_BYTES = 70_000
"""So small that tiny checkpoints have several shards."""
STEPS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (shutil, "rmtree"),
    (shutil, "copyfile"),
)


def main() -> None:
    """Answer requests until the input ends."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel  # noqa: F401 - imported once for all children

    from qembed.quantize import run, verify  # noqa: F401

    assert torch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        request = json.loads(line)
        if "shell" in request:
            answer: dict[str, Any] = {"code": subprocess.run(request["shell"], shell=True, stdout=sys.stderr).returncode}
        else:
            answer = fork(request["arguments"], request.get("kill", 0), request.get("signal", signal.SIGKILL))
        print(json.dumps(answer), flush=True)


def fork(arguments: list[str], kill: int | str, number: int) -> dict[str, Any]:
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
                end = quantize(arguments, kill, number, steps)
            finally:
                sys.stderr.flush()
                os._exit(end)
        _, status = os.waitpid(child, 0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "steps": steps.read_text().splitlines() if steps.exists() else [],
            "stderr": errors.read_text(),
        }


def quantize(arguments: list[str], kill: int | str, number: int, steps: Path) -> int:
    """The command itself, each step on disk noted before it is taken, and the one with number `kill` never taken."""
    from qembed.cli import group
    from qembed.quantize import parts

    parts.SHARD_BYTES = SHARD_BYTES
    count = 0
    log = steps.open("a")

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            step = f"{name} {getattr(given[0], 'name', given[0])}"
            log.write(step + "\n")
            log.flush()
            if kill in (count, step):
                os.kill(os.getpid(), number)
            return function(*given, **options)

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, watch(name, getattr(owner, name)))
    try:
        group.main(["quantize", *arguments], prog_name="qembed")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    main()
