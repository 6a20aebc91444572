"""Runs vLLM, watches it, stops it.

    with engine.running(ServerSettings(checkpoint, port=0)) as server:
        vectors = client.embed(texts, url=server.url, model=server.model)

The server is the leader of a session of its own: a Ctrl-C in the terminal reaches only us, and whatever it has started can be
found and ended by that session, even if the leader is gone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from qembed.checkpoint.description import Checkpoint
from qembed.client import http
from qembed.errors import BadInput, QembedError
from qembed.vllm import gate_rules, kernels, log, machine, ports, sglang, shutdown, watchdog
from qembed.vllm.arguments import arguments, environment, rules
from qembed.vllm.settings import Launch, ServerSettings, check_fits, resolve
from qembed.vllm.unavailable import Unavailable

POLL = 0.25
LOOK_EVERY = 5.0  # seconds; more often where --hang-timeout is short
FIRST_TEXT = "hello"
SERVING_GRACE = 20.0  # beyond the time for requests that are still being computed
STARTING_GRACE = 5.0  # there is nothing to finish yet
BACK_OFF = (1.0, 2.0, 5.0, 15.0, 60.0)
STABLE = 600.0  # seconds after which a restart counts as a success

OnStage = Callable[[str], None]
OnWarning = Callable[[str], None]


@dataclass
class Server:
    """A vLLM that is running, or was."""

    launch: Launch
    listener: socket.socket | None = None
    restarts: int = 0
    lines: list[str] = field(default_factory=list)
    serving: bool = False
    used_before: int | None = None
    _token: str = field(default_factory=secrets.token_urlsafe, repr=False)
    _process: subprocess.Popen[bytes] | None = None
    _log: log.Log | None = None
    _failed: bool = False
    _seconds: float = 30.0  # that the last start took

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

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The leader of the server's session."""
        assert self._process is not None, "not started"
        return self._process

    def memory(self) -> int:
        """Bytes in use on the device: measured where the system tells, else planned."""
        return self.measured().get("total", self.launch.plan.total)

    def measured(self) -> dict[str, int]:
        """Bytes by line of the plan, as far as they can be measured: "total", and what vLLM's log tells.

        Of several devices the mean, as the plan is for one.
        """
        parts = self.launch.settings.tensor_parallel_size * self.launch.settings.data_parallel_size
        if self.launch.device == "cpu":
            total = machine.resident(self.process.pid)
            return {} if total is None else {"total": total // parts}
        total = machine.cuda_used(machine.processes(self.process.pid))
        if total is not None:
            total //= parts
        elif self.used_before is not None and (now := machine.cuda_total_used()) is not None:
            total = now - self.used_before
        return {} if not total else {"total": total, **log.memory(self.lines)}

    def start(self, report: OnStage) -> None:
        """Start vLLM and wait until it has answered a first text.

        Raises:
            QembedError: it ended, or did not answer in time.
        """
        self.serving, self._failed, self.lines = False, False, []
        begin = time.monotonic()
        handle, name = tempfile.mkstemp(prefix="qembed-vllm-", suffix=".log")
        os.close(handle)
        self._log = log.Log(Path(name))
        if self.launch.device == "cuda":
            self.used_before = machine.cuda_total_used()
        with open(name, "ab") as output:  # appended to, so that it can be cut while vLLM writes
            self._process = subprocess.Popen(
                command(self.launch),
                env=environment(self.launch, os.environ, machine.cores()),
                stdin=subprocess.PIPE,  # closes when we die, and ends it: see server_process.py
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=() if self.listener is None else (self.listener.fileno(),),
            )
        if self.launch.settings.engine == "vllm":
            handed = None if self.listener is None else self.listener.fileno()
            self._tell(rules(self.launch, self._token, self.restarts, handed).dump())
        deadline = begin + self.launch.settings.startup_timeout
        with self._stand_in():
            _wait(self, report, deadline)
        # The first request loads what start-up did not, and shows a kernel that this CPU does not have.
        _first_answer(self, max(10.0, deadline - time.monotonic()))
        self._seconds = time.monotonic() - begin
        self.serving = True

    def _stand_in(self) -> AbstractContextManager[object]:
        settings = self.launch.settings
        if self.listener is None:
            return contextlib.nullcontext()
        tls = (settings.ssl_certfile, settings.ssl_keyfile) if settings.ssl_certfile and settings.ssl_keyfile else None
        return Unavailable(self.listener, tls, min(60, math.ceil(self._seconds)))

    def stop(self) -> None:
        """End the server with all its processes. Requests that are being computed get their answers first."""
        if self._log is not None:
            self.read_log()
            self._log.close()
            if not self._failed:
                self._log.path.unlink(missing_ok=True)
        if self._process is not None:
            seconds = self.launch.settings.shutdown_timeout
            drain = b"%s %f\n" % (gate_rules.DRAIN, seconds)
            drained = (
                self.serving and self.launch.settings.engine == "vllm" and self._process.poll() is None and self._tell(drain)
            )
            shutdown.stop(self._process, drained, SERVING_GRACE + seconds if self.serving else STARTING_GRACE)
        self.serving = False
        self._process = self._log = None

    def read_log(self) -> list[str]:
        """New lines of vLLM's log; they go to stderr too if the settings say `verbose`."""
        assert self._log is not None
        fresh = self._log.new_lines()
        self.lines = [*self.lines, *fresh][-2000:]
        for line in fresh:
            if self.launch.settings.verbose or line.startswith(gate_rules.TEXTS):
                log.show(line, self.launch.settings.log_format)
        return fresh

    def watch(self, report: OnStage = lambda _: None, warn: OnWarning = lambda _: None) -> None:
        """Wait; when vLLM ends or hangs, start it again, after growing pauses, up to `max_restarts` times in a row.

        Raises:
            QembedError: it ended once more. Only an exception from outside, such as KeyboardInterrupt, leaves this otherwise.
        """
        in_a_row = 0
        failure: QembedError | None = None
        while True:
            since = time.monotonic()
            hung = self._until_it_ends()
            in_a_row = 0 if time.monotonic() - since > STABLE else in_a_row
            if failure is None:
                failure = self.failure("vLLM ended", hung)
            if in_a_row >= self.launch.settings.max_restarts:
                raise failure
            pause = BACK_OFF[min(in_a_row, len(BACK_OFF) - 1)]
            in_a_row += 1
            self.restarts += 1
            warn(f"{failure}; starting it again in {pause:g} s ({in_a_row} of {self.launch.settings.max_restarts})")
            self.stop()
            with self._stand_in():
                time.sleep(pause)
            try:
                self.start(report)
                failure = None
                warn("vLLM answers again")
            except QembedError as error:
                failure = error

    def _until_it_ends(self) -> str | None:
        """Wait until vLLM has ended, or ends because it hangs; what is wrong then."""
        timeout = self.launch.settings.hang_timeout
        dog = watchdog.Watchdog(timeout)
        every = min(LOOK_EVERY, timeout / 4)
        look_at = time.monotonic() + every
        hung = None
        while self.serving and self.process.poll() is None:
            self.read_log()
            if timeout and time.monotonic() >= look_at:
                look_at = time.monotonic() + every
                now = self._look()
                if hung is None and (hung := dog.hung(now)) is not None:
                    shutdown.end_hung(self.process, answers=now.texts is not None)
            time.sleep(2 * POLL)
        return hung

    def _look(self) -> watchdog.Look:
        """How vLLM looks to the watchdog."""
        leader = self.process.pid
        others = [pid for pid in machine.processes(leader) if pid != leader] or [leader]
        path = "/metrics" if self.launch.settings.engine == "vllm" else "/health"
        try:
            status, said = self.request("GET", path, None, LOOK_EVERY)
        except (OSError, HTTPException):
            return watchdog.Look(None, (), machine.cpu_seconds([leader]))
        return watchdog.look(said.decode(errors="replace") if status == 200 else "", machine.cpu_seconds(others))

    def failure(self, what: str, why: str | None = None) -> QembedError:
        """An error that says `what`, and why, out of the log unless it is given, and where the log is."""
        self.read_log()
        assert self._log is not None
        self._failed = True
        said = why or f"{what}: {log.cause(self.lines) or _exit(self.process.poll())}"
        return QembedError(f"{said} (log: {self._log.path})")

    def request(self, method: str, path: str, body: str | None, timeout: float) -> tuple[int, bytes]:
        """Status and answer of the server itself."""
        headers = {"Authorization": f"Bearer {self._token}"}
        origin = self.url.removesuffix("/v1")
        return http.request(f"{origin}{path}", method=method, body=body, headers=headers, timeout=timeout, own=True)

    def _tell(self, line: bytes) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:  # it has ended, which is seen elsewhere
            return False
        return True


@contextmanager
def running(
    asked: ServerSettings | Checkpoint, on_stage: OnStage | None = None, on_launch: Callable[[Launch], None] | None = None
) -> Iterator[Server]:
    """A server that answers, and is ended with all its processes when the block is left.

    A checkpoint alone is served on a free port, with texts as they come, and else with the default settings.
    `on_launch` is told the plan before anything is started, `on_stage` what is being done, in a few words, while it starts.

    Raises:
        BadInput: the checkpoint cannot be served with these settings, or not in the memory that there is.
        MissingExtra: vLLM is not installed.
        QembedError: the port is taken, vLLM died, or did not answer within `ServerSettings.startup_timeout`.
    """
    settings = ServerSettings(asked, port=0, clean=False) if isinstance(asked, Checkpoint) else asked
    report = on_stage or (lambda _: None)
    (sglang.check if settings.engine == "sglang" else check_vllm)(settings)
    with ports.listen(settings.host, settings.port) as listener:
        port = int(listener.getsockname()[1])
        target = machine.target()
        launch = resolve(settings, target, kernels.this_cpu(), port)
        if on_launch:
            on_launch(launch)
        check_fits(launch)
        report("starting vLLM")
        keep = settings.engine == "vllm" and machine.takes_a_socket()
        if not keep:
            listener.close()
        server = Server(launch, listener if keep else None)
        try:
            server.start(report)
            yield server
        finally:
            listener.close()  # vLLM has its own copy until it ends
            server.stop()


def check_vllm(settings: ServerSettings) -> None:
    """See that vLLM is installed, has a device, and will load the plugin where the checkpoint needs it.

    Raises:
        BadInput: VLLM_PLUGINS leaves the plugin out.
        MissingExtra: vLLM is not installed.
        QembedError: it has no device.
    """
    machine.check_vllm()
    machine.check_device()
    allowed = os.environ.get("VLLM_PLUGINS")
    needs = settings.checkpoint.has_int8_table or settings.makes_table
    if needs and allowed is not None and "qembed" not in allowed.split(","):
        raise BadInput(f"VLLM_PLUGINS={allowed} leaves qembed's plugin out, which an INT8 token table needs; add qembed to it")


def command(launch: Launch) -> list[str]:
    """What is run."""
    if launch.settings.engine == "sglang":
        return [sys.executable, "-m", "sglang.launch_server", *sglang.arguments(launch)]
    return [sys.executable, "-m", "qembed.serve.server_process", *arguments(launch)]


def _wait(server: Server, report: OnStage, deadline: float) -> None:
    """Wait until vLLM says that it is well."""
    while not _healthy(server):
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


def _healthy(server: Server) -> bool:
    try:
        return server.request("GET", "/health", None, 5.0)[0] == 200
    except (OSError, HTTPException):
        return False


def _first_answer(server: Server, timeout: float) -> None:
    body = json.dumps({"model": server.model, "input": FIRST_TEXT})
    try:
        status, answer = server.request("POST", "/v1/embeddings", body, timeout)
        if status == 200:
            vector = json.loads(answer)["data"][0]["embedding"]
            if len(vector) == server.launch.hidden_size and all(map(math.isfinite, vector)):
                return
            raise server.failure("vLLM's first answer is no vector")
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise server.failure("vLLM failed at the first text") from error
    raise server.failure(f"vLLM failed at the first text (HTTP status {status})")


def _exit(code: int | None) -> str:
    if code is None:
        return "no answer, and nothing in its log says why"
    if code == -signal.SIGKILL:
        return "it was killed (signal 9), as the system does when memory runs out"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}, and nothing in its log says why"
