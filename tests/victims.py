"""Runs `qembed` commands that kill themselves at a chosen file operation.

A server process imports everything once and forks a child for each request. A request is {"arguments": […], "kill": N or name}:
the child gets SIGKILL (or "signal": number) right before its Nth file operation, called a step (0: never), or before the first
step of that name. The answer is {"code": exit status, "steps": [names of the steps so far], "stderr": text}.
{"shell": command} runs a shell command instead.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "truncate"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (shutil, "rmtree"),
    (shutil, "copyfile"),
)


class Victims:
    """Client of the process that forks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request; returns the answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, *arguments: object, kill: int | str = 0, number: int = signal.SIGKILL) -> dict[str, Any]:
        """Run `qembed` with `arguments`; it gets the signal `number` before the step `kill`."""
        return self.ask(arguments=list(map(str, arguments)), kill=kill, signal=number)


@contextmanager
def victims(module: str, *before: str, environment: Mapping[str, str]) -> Iterator[Victims]:
    """Start `python -m module`, prefixed with the command `before`; the module must call `answer`."""
    command = [*before, sys.executable, "-m", module]
    variables = {**os.environ, **environment}
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Victims(process)
        assert process.stdin
        process.stdin.close()


def answer() -> None:
    """Answer requests from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
    for line in sys.stdin:
        request = json.loads(line)
        if "shell" in request:
            response: dict[str, Any] = {"code": subprocess.run(request["shell"], shell=True, stdout=sys.stderr).returncode}
        else:
            response = _fork(request["arguments"], request.get("kill", 0), request.get("signal", signal.SIGKILL))
        print(json.dumps(response), flush=True)


def _fork(arguments: list[str], kill: int | str, number: int) -> dict[str, Any]:
    """Run the command in a forked child; returns the answer to the request."""
    with tempfile.TemporaryDirectory() as folder:
        steps, errors = Path(folder, "steps"), Path(folder, "errors")
        child = os.fork()
        if child == 0:
            code = 99
            try:
                descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                code = _command(arguments, kill, number, steps)
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "steps": steps.read_text().splitlines() if steps.exists() else [],
            "stderr": errors.read_text(),
        }


def _command(arguments: list[str], kill: int | str, number: int, steps: Path) -> int:
    """Run the command; logs every step before it happens and sends the signal before the step `kill`. Returns the exit code."""
    from qembed.cli import group

    lock = threading.Lock()  # a command may write in several threads
    count = 0
    log = steps.open("a")

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*values: Any, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                step = f"{name} {getattr(values[0], 'name', values[0])}"
                log.write(step + "\n")
                log.flush()
                if kill in (count, step):
                    os.kill(os.getpid(), number)
            return function(*values, **options)

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, watch(name, getattr(owner, name)))
    try:
        group.main(arguments, prog_name="qembed")
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0
