"""Runs vLLM, watches it, stops it.

    with engine.running(Settings(checkpoint, port=0)) as server:
        vectors = client.embed(texts, url=server.url, model=server.model)

The server is the leader of a session of its own: a Ctrl-C in the terminal reaches only us, and whatever it has started can be
found and ended by that session, even if the leader is gone.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from qembed.checkpoint import Checkpoint
from qembed.errors import BadInput, QembedError
from qembed.serve import log, machine
from qembed.serve.settings import SHUTDOWN_TIMEOUT, Launch, Settings, arguments, environment, resolve

POLL = 0.25
FIRST_TEXT = "hello"
SERVING_GRACE = SHUTDOWN_TIMEOUT + 10.0
STARTING_GRACE = 5.0  # there is nothing to finish yet
KILL_GRACE = 5.0

OnStage = Callable[[str], None]


@dataclass
class Server:
    """A vLLM that is running, or was."""

    launch: Launch
    process: subprocess.Popen[bytes]
    log: log.Log
    lines: list[str] = field(default_factory=list)
    serving: bool = False
    failed: bool = False

    @property
    def url(self) -> str:
        """The base URL for an openai client."""
        return self.launch.url

    @property
    def model(self) -> str:
        """The model name that requests must give."""
        return self.launch.settings.name

    @property
    def device(self) -> str:
        """What it computes on: "cpu" or "cuda"."""
        return self.launch.device

    @property
    def dtype(self) -> str:
        """What it computes in: "float32", …"""
        return self.launch.dtype

    @property
    def limit(self) -> int:
        """The longest text, in tokens."""
        return self.launch.max_model_len

    def memory(self) -> int:
        """Bytes in use: measured where the system tells, else planned."""
        if self.launch.device == "cuda":
            return machine.cuda_used(machine.processes(self.process.pid)) or self.launch.plan.total
        return machine.resident(self.process.pid) or self.launch.plan.total

    def read_log(self) -> list[str]:
        """New lines of vLLM's log; they go to stderr too if the settings say `verbose`."""
        fresh = self.log.new_lines()
        self.lines = [*self.lines, *fresh][-2000:]
        if self.launch.settings.verbose:
            for line in fresh:
                sys.stderr.write(line + "\n")
        return fresh

    def watch(self) -> None:
        """Wait for vLLM's end.

        Raises:
            QembedError: it ended. Only an exception from outside, such as KeyboardInterrupt, leaves this otherwise.
        """
        while self.process.poll() is None:
            self.read_log()
            time.sleep(2 * POLL)
        raise self.failure("vLLM ended")

    def failure(self, what: str) -> QembedError:
        """An error that says `what`, and why, out of the log, and where the log is."""
        self.read_log()
        self.failed = True
        why = log.cause(self.lines) or _exit(self.process.poll())
        return QembedError(f"{what}: {why} (log: {self.log.path})")


@contextmanager
def running(asked: Settings | Checkpoint, on_stage: OnStage | None = None) -> Iterator[Server]:
    """A server that answers, and is ended with all its processes when the block is left.

    A checkpoint alone is served with the default settings on a free port. `on_stage` is told what is being done, in a few
    words, while it starts.

    Raises:
        BadInput: the checkpoint cannot be served with these settings.
        MissingExtra: vLLM is not installed.
        QembedError: the port is taken, vLLM died, or did not answer within `Settings.startup_timeout`.
    """
    settings = Settings(asked, port=0) if isinstance(asked, Checkpoint) else asked
    report = on_stage or (lambda _: None)
    machine.check_vllm()
    port = settings.port or free_port(settings.host)
    check_port(settings.host, port)
    kind = machine.device()
    launch = resolve(settings, kind, machine.best_dtype(kind), port)
    report("starting vLLM")
    with _started(launch) as server:
        _wait(server, report)
        server.serving = True
        yield server


def check_port(host: str, port: int) -> None:
    """See that `port` of `host` can be bound.

    Raises:
        BadInput: `host` is no address of this machine, or we may not use that port.
        QembedError: something else listens there.
    """
    try:
        with _bound(host, port):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise QembedError(f"port {port} of {host} is taken; choose another with --port") from error
        raise BadInput(f"{host}:{port} cannot be listened on: {error.strerror or error}") from error


def free_port(host: str) -> int:
    """A port of `host` that nothing listens on now.

    Raises:
        BadInput: `host` is no address of this machine.
    """
    try:
        with _bound(host, 0) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise BadInput(f"{host} cannot be listened on: {error.strerror or error}") from error


def _bound(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


@contextmanager
def _started(launch: Launch) -> Iterator[Server]:
    handle, name = tempfile.mkstemp(prefix="qembed-vllm-", suffix=".log")
    reader = log.Log(Path(name))
    server = None
    try:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "qembed.serve.vllm_main", *arguments(launch)],
                env=environment(launch, os.environ, machine.cores()),
                stdin=subprocess.PIPE,  # closes when we die, and ends it: see vllm_main.py
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(handle)
        server = Server(launch, process, reader)
        yield server
    finally:
        reader.close()
        if server is None or not server.failed:
            Path(name).unlink(missing_ok=True)
        if server is not None:
            _stop(server.process, SERVING_GRACE if server.serving else STARTING_GRACE)


def _stop(process: subprocess.Popen[bytes], grace: float) -> None:
    """End the session: SIGTERM to its leader, then, for what is left, SIGKILL to all. A second Ctrl-C skips the first part."""
    shared = machine.shared_memory(process.pid)
    try:
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


def _wait(server: Server, report: OnStage) -> None:
    deadline = time.monotonic() + server.launch.settings.startup_timeout
    while not _healthy(server.url):
        if server.process.poll() is not None:
            raise server.failure("vLLM did not start")
        if time.monotonic() > deadline:
            raise server.failure(f"vLLM did not answer within {server.launch.settings.startup_timeout:g} s (--startup-timeout)")
        for line in server.read_log():
            doing = log.stage(line)
            if doing:
                report(doing)
        time.sleep(POLL)
    report(log.STAGES[-1][1])
    # The first request loads what start-up did not, and shows a kernel that this CPU does not have.
    _first_answer(server, max(10.0, deadline - time.monotonic()))


def _healthy(url: str) -> bool:
    try:
        return _request(url, "GET", "/health", None, 5.0)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _first_answer(server: Server, timeout: float) -> None:
    body = json.dumps({"model": server.model, "input": FIRST_TEXT})
    try:
        status, answer = _request(server.url, "POST", "/v1/embeddings", body, timeout)
        if status == 200:
            vector = json.loads(answer)["data"][0]["embedding"]
            if len(vector) == server.launch.hidden_size and all(map(math.isfinite, vector)):
                return
            raise server.failure("vLLM's first answer is no vector")
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise server.failure("vLLM failed at the first text") from error
    raise server.failure(f"vLLM failed at the first text (HTTP status {status})")


def _request(url: str, method: str, path: str, body: str | None, timeout: float) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _exit(code: int | None) -> str:
    if code is None:
        return "no answer, and nothing in its log says why"
    if code == -signal.SIGKILL:
        return "it was killed (signal 9), as the system does when memory runs out"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}, and nothing in its log says why"
