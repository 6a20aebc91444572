"""Supervision of vLLM: starts it, restarts it when it dies or hangs, and stops it.

    with supervisor.running(ServerSettings(checkpoint, port=0)) as server:
        vectors = embeddings.embed(texts, url=server.url, model=server.model)

The server process leads a session of its own. So a Ctrl-C in the terminal reaches only qembed, and all processes of the server
can be found and ended by that session, even if its leader is gone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import IO

from qembed.checkpoint.description import Checkpoint
from qembed.client import http
from qembed.errors import BadInput, QembedError
from qembed.text.display import escaped
from qembed.vllm import gate_rules, kernels, keys, log, machine, ports, readiness, scratch, sglang, shutdown, watchdog
from qembed.vllm.arguments import arguments, key_hashes, rules, server_environment
from qembed.vllm.settings import Launch, ServerSettings, check_fits, resolve
from qembed.vllm.unavailable import Unavailable

POLL = 0.25
CHECK_INTERVAL = 5.0  # seconds between checks, and to answer one; less if --hang-timeout is short
SHARE = 1 / 8
"""The share of --hang-timeout for each: both together are less than the third that counts at a time (`Watchdog.check`)."""
SERVING_GRACE = 20.0  # seconds in addition to --shutdown-timeout
STARTING_GRACE = 5.0  # seconds; there are no requests to finish
BACK_OFF = (1.0, 2.0, 5.0, 15.0, 60.0)  # seconds before the first, second, … restart in a row
MAX_LINES, MAX_LINE = 2000, 4096  # of the log that are kept, and characters of each
STABLE = 600.0  # seconds after which a restart counts as a success

OnStage = Callable[[str], None]
OnWarning = Callable[[str], None]


@dataclass
class Server:
    """A vLLM server: its processes, log and restarts."""

    launch: Launch
    listener: socket.socket | None = None
    restarts: int = 0
    lines: list[str] = field(default_factory=list)
    serving: bool = False
    gpu_bytes_before: int | None = None
    _token: str = field(default_factory=secrets.token_urlsafe, repr=False)
    _process: subprocess.Popen[bytes] | None = None
    _log: log.Log | None = None
    _scratch: scratch.Scratch | None = None
    _failed: bool = False
    _keys: keys.KeysInForce = field(init=False, repr=False)
    _suspects: IO[bytes] | None = None
    _start_seconds: float = 30.0  # duration of the last start

    def __post_init__(self) -> None:
        self._keys = keys.KeysInForce(self.launch.settings.keys, self.launch.settings.key_file)

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
        """The kind of device: "cpu" or "cuda"."""
        return self.launch.device

    @property
    def dtype(self) -> str:
        """The dtype of the computation, such as "float32"."""
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
        """Bytes in use on the device: measured if possible, else planned."""
        return self.measured().get("total", self.launch.plan.total)

    def measured(self) -> dict[str, int]:
        """Measured bytes by line of the plan: "total", and the lines that vLLM logs; empty if nothing can be measured.

        With several devices the mean, because the plan is for one of them.
        """
        parts = self.launch.settings.tensor_parallel_size * self.launch.settings.data_parallel_size
        if self.launch.device == "cpu":
            total = machine.resident(self.process.pid)
            return {} if total is None else {"total": total // parts}
        total = machine.cuda_used(machine.processes(self.process.pid))
        if total is not None:
            total //= parts
        elif self.gpu_bytes_before is not None and (now := machine.cuda_total_used()) is not None:
            total = now - self.gpu_bytes_before
        return {} if not total else {"total": total, **log.memory(self.lines)}

    def start(self, report: OnStage) -> None:
        """Start vLLM, and wait until it has answered a first text.

        Raises:
            QembedError: it died, or did not answer in time.
        """
        self.serving, self._failed, self.lines = False, False, []
        begin = time.monotonic()
        scratch.remove_abandoned()
        self._scratch = scratch.Scratch()
        self._log = log.Log(self._scratch.log)
        if self._suspects is None:
            self._suspects = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open from one start of vLLM to the next
        if self.launch.device == "cuda":
            self.gpu_bytes_before = machine.cuda_total_used()
        with self._scratch.log.open("ab") as output:  # append mode, so that it can be truncated while vLLM writes
            self._process = subprocess.Popen(
                command(self.launch),
                env={
                    **server_environment(self.launch, os.environ, machine.cores()),
                    "TMPDIR": str(self._scratch.folder),
                },
                stdin=subprocess.PIPE,  # it closes when qembed dies, which ends the server: see server_process.py
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[file.fileno() for file in (self.listener, self._suspects) if file is not None],
            )
        if self.launch.settings.engine == "vllm":
            listener = None if self.listener is None else self.listener.fileno()
            in_force = rules(self.launch, self._token, self.restarts, listener, self._suspects.fileno(), self._keys.names)
            self._send(replace(in_force, restart_seconds=self._wait_seconds).dump())
        deadline = begin + self.launch.settings.startup_timeout
        with self._unavailable():
            readiness.wait(self, report, deadline, POLL)
        # The first request loads lazily loaded parts, and reveals a kernel that this CPU lacks.
        readiness.check_first_answers(self, max(10.0, deadline - time.monotonic()))
        self._start_seconds = time.monotonic() - begin
        self._scratch.note(machine.shared_memory(self.process.pid))
        self.serving = True

    @property
    def _wait_seconds(self) -> int:
        """Retry-After while vLLM starts, in seconds: the duration of the last start, at most a minute."""
        return min(60, math.ceil(self._start_seconds))

    def _unavailable(self) -> AbstractContextManager[object]:
        """A context in which the port answers 503, if qembed owns the socket."""
        settings = self.launch.settings
        if self.listener is None:
            return contextlib.nullcontext()
        tls = (settings.ssl_certfile, settings.ssl_keyfile) if settings.ssl_certfile and settings.ssl_keyfile else None
        return Unavailable(self.listener, tls, self._wait_seconds)

    def stop(self) -> None:
        """Stop all processes of the server. Requests in progress are finished first, within `shutdown_timeout`."""
        if self._log is not None:
            self.read_log()
            self._log.close()
            if not self._failed:
                self._log.path.unlink(missing_ok=True)
        if self._process is not None:
            seconds = self.launch.settings.shutdown_timeout
            drain = b"%s %f\n" % (gate_rules.DRAIN, seconds)
            drained = (
                self.serving and self.launch.settings.engine == "vllm" and self._process.poll() is None and self._send(drain)
            )
            shutdown.stop(self._process, drained, SERVING_GRACE + seconds if self.serving else STARTING_GRACE)
        if self._scratch is not None:
            self._scratch.remove()
        self.serving = False
        self._process = self._log = self._scratch = None

    def read_log(self) -> list[str]:
        """The new lines of vLLM's log. Also shows them on stderr if `verbose` is set."""
        assert self._log is not None
        lines = [log.own(line) or line for line in self._log.new_lines()]
        new = [line[:MAX_LINE] for line in lines if not line.startswith(log.OWN)]
        self.lines = [*self.lines, *new][-MAX_LINES:]
        for line in lines:
            if line.startswith(gate_rules.ACCESS):
                log.access(line.removeprefix(gate_rules.ACCESS), self.launch.settings.log_format)
            elif self.launch.settings.verbose or line.startswith(gate_rules.TEXTS):
                log.show(line, self.launch.settings.log_format)
        return lines

    def watch(self, report: OnStage = lambda _: None, warn: OnWarning = lambda _: None) -> None:
        """Restart vLLM whenever it ends or hangs, after growing pauses, up to `max_restarts` times in a row.

        Runs until an exception from outside, such as KeyboardInterrupt.

        Raises:
            QembedError: vLLM ended once more after `max_restarts` restarts.
        """
        attempts = 0
        failure: QembedError | None = None
        while True:
            start = time.monotonic()
            hung = self._until_it_ends(warn)
            attempts = 0 if time.monotonic() - start > STABLE else attempts
            if failure is None:
                failure = self.failure("vLLM ended", hung)
            if attempts >= self.launch.settings.max_restarts:
                raise failure
            pause = BACK_OFF[min(attempts, len(BACK_OFF) - 1)]
            attempts += 1
            self.restarts += 1
            warn(f"{failure}; starting it again in {pause:g} s ({attempts} of {self.launch.settings.max_restarts})")
            self.stop()
            with self._unavailable():
                time.sleep(pause)
            try:
                self.start(report)
                failure = None
                warn("vLLM answers again")
            except QembedError as error:
                failure = error

    def reread_keys(self) -> None:
        """Read the file of keys again soon, even if it seems unchanged. May be called in a signal handler."""
        self._keys.expired = True

    def _until_it_ends(self, warn: OnWarning) -> str | None:
        """Wait until vLLM ends, and end it if it hangs; the message of the hang, or None."""
        timeout = self.launch.settings.hang_timeout
        dog = watchdog.Watchdog(timeout)
        interval = min(CHECK_INTERVAL, timeout * SHARE)
        next_check = time.monotonic() + interval
        hung = None
        while self.serving and self.process.poll() is None:
            self.read_log()
            if self._keys.renewed(warn):
                self._send(gate_rules.KEYS + b" " + json.dumps(key_hashes(self._keys.names, self._token)).encode() + b"\n")
            if timeout and time.monotonic() >= next_check:
                next_check = time.monotonic() + interval
                now = self._observe()
                if hung is None and (hung := dog.check(now)) is not None:
                    shutdown.end_hung(self.process, answers=now.texts is not None)
            time.sleep(2 * POLL)
        return hung

    def _observe(self) -> watchdog.Observation:
        """The state of vLLM for the watchdog."""
        leader = self.process.pid
        others = [pid for pid in machine.processes(leader) if pid != leader] or [leader]
        path = "/metrics" if self.launch.settings.engine == "vllm" else "/health"
        try:
            status, answer = self.request("GET", path, None, min(CHECK_INTERVAL, self.launch.settings.hang_timeout * SHARE))
        except (OSError, HTTPException):
            return watchdog.Observation(None, (), machine.cpu_seconds([leader]))
        return watchdog.observe(answer.decode(errors="replace") if status == 200 else "", machine.cpu_seconds(others))

    def failure(self, event: str, message: str | None = None) -> QembedError:
        """An error with the path of the log, and `message`, or else `event` and its cause from the log."""
        self.read_log()
        assert self._log is not None
        self._failed = True
        message = message or f"{event}: {log.cause(self.lines) or shutdown.exit_in_words(self.process.poll())}"
        if machine.shared_memory_is_full():
            message += "; /dev/shm is full: free it, or make it larger (docker run --shm-size)"
        return QembedError(f"{escaped(message)} (log: {self._log.path})")

    def request(self, method: str, path: str, body: str | None, timeout: float) -> tuple[int, bytes]:
        """Status and answer of the server to a request of qembed's own."""
        headers = {"Authorization": f"Bearer {self._token}"}
        origin = self.url.removesuffix("/v1")
        return http.request(f"{origin}{path}", method=method, body=body, headers=headers, timeout=timeout, own=True)

    def _send(self, line: bytes) -> bool:
        """Send a line to the server process; whether it could be written."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:  # it has ended, which the caller notices elsewhere
            return False
        return True


@contextmanager
def running(
    settings: ServerSettings | Checkpoint,
    on_stage: OnStage | None = None,
    on_launch: Callable[[Launch], None] | None = None,
    on_interrupt: Callable[[], None] = lambda: None,
) -> Iterator[Server]:
    """A server that answers; leaving the block stops all its processes.

    A checkpoint is served on a free port, without text cleaning, and with the default settings otherwise. `on_launch` gets
    the plan before anything starts. `on_stage` gets a few words at each stage of the start. `on_interrupt` is called at a
    KeyboardInterrupt, before the processes are stopped.

    Raises:
        BadInput: the checkpoint cannot be served with these settings or in the free memory.
        MissingExtra: vLLM is not installed.
        QembedError: the port is taken, or vLLM died or did not answer within `ServerSettings.startup_timeout`.
    """
    if isinstance(settings, Checkpoint):
        settings = ServerSettings(settings, port=0, clean=False)
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
        shares_socket = settings.engine == "vllm" and machine.accepts_listener()
        if not shares_socket:
            listener.close()
        server = Server(launch, listener if shares_socket else None)
        try:
            server.start(report)
            yield server
        except KeyboardInterrupt:
            on_interrupt()
            raise
        finally:
            listener.close()  # vLLM has its own copy
            server.stop()


def check_vllm(settings: ServerSettings) -> None:
    """Check that vLLM is installed, has a device, and loads qembed's plugin if the checkpoint needs it.

    Raises:
        BadInput: VLLM_PLUGINS excludes the plugin.
        MissingExtra: vLLM is not installed.
        QembedError: it has no device.
    """
    machine.check_vllm()
    machine.check_device()
    allowed = os.environ.get("VLLM_PLUGINS")
    needs_plugin = settings.checkpoint.has_int8_table or settings.converts_table
    if needs_plugin and allowed is not None and "qembed" not in allowed.split(","):
        raise BadInput(f"VLLM_PLUGINS={allowed} leaves qembed's plugin out, which an INT8 token table needs; add qembed to it")


def command(launch: Launch) -> list[str]:
    """The command line of the server process."""
    if launch.settings.engine == "sglang":
        return [sys.executable, "-m", "sglang.launch_server", *sglang.arguments(launch)]
    return [sys.executable, "-m", "qembed.serve.server_process", *arguments(launch)]
