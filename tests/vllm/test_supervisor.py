"""Failures of vLLM: death, hangs and wrong answers, with a fake vLLM. tests/e2e runs the real one."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput, QembedError
from qembed.vllm import kernels, machine, supervisor
from qembed.vllm.devices import Target
from qembed.vllm.settings import ServerSettings

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        POST
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def answer(number: str, length: int) -> str:
    """Code of a request handler that answers with a vector of `length` times `number`."""
    body = f'{{"data": [{{"embedding": [{", ".join([number] * length)}]}}]}}'
    return f"self.send_response(200); self.end_headers(); self.wfile.write({body.encode()!r})"


def fail(settings: ServerSettings) -> str:
    """The error message of a failed start."""
    with pytest.raises(QembedError) as caught, supervisor.running(settings):
        pass
    return str(caught.value)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_taken_port_is_reported_before_anything_starts(checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path) -> None:
    fake_vllm.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(QembedError, match=f"port {port} of 127.0.0.1 is taken; choose another with --port"):
            supervisor.running(ServerSettings(checkpoint, port=port)).__enter__()
    assert not (tmp_path / "ran").exists()


def test_a_host_of_another_machine_is_refused(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.touch()
    with pytest.raises(BadInput, match=r"192\.0\.2\.1"):
        supervisor.running(ServerSettings(checkpoint, host="192.0.2.1")).__enter__()


def overflowing(message: str | None) -> str:
    """Code of a server whose vectors of texts with "import" are NaN; the gate answers those with status 500 and `message`."""
    refused = f'{{"error": {{"message": "{message}"}}}}'
    nan = (
        answer("NaN", 64)
        if message is None
        else f"self.send_response(500); self.end_headers(); self.wfile.write({refused.encode()!r})"
    )
    handler = f"""if b"import" in self.rfile.read(int(self.headers["Content-Length"])): {nan}
        else: {answer("1.0", 64)}"""
    return SERVER.replace("POST\n", handler + "\n")


@pytest.mark.parametrize("message", [None, "the vector of input holds NaN or infinity; it is not passed on"])
def test_a_model_that_overflows_float16_is_refused_in_it_by_the_first_texts(
    checkpoint: Checkpoint, fake_vllm: Path, message: str | None
) -> None:
    fake_vllm.write_text(overflowing(message))
    error = fail(ServerSettings(checkpoint, port=0, dtype="float16"))
    for part in (str(checkpoint.folder), "65,504", "'import'", "--dtype bfloat16", "qembed quantize"):
        assert part in error
    with supervisor.running(ServerSettings(checkpoint, port=0, dtype="bfloat16")) as server:
        assert server.serving


def test_a_death_at_start_is_reported_with_cause_and_log(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("raise ValueError('no such weight')")
    message = fail(ServerSettings(checkpoint, port=0))
    assert message.startswith("vLLM did not start: ValueError: no such weight (log: ")
    assert "\n" not in message
    log = Path(message.rpartition("log: ")[2].rstrip(")"))
    assert "Traceback" in log.read_text()


def test_a_kill_at_start_is_reported(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("import os; os.kill(os.getpid(), 9)")
    assert "killed (signal 9), as the system does when memory runs out" in fail(ServerSettings(checkpoint, port=0))


def test_a_start_that_takes_too_long_is_an_error(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("import time; time.sleep(600)")
    assert "did not answer within 1 s (--startup-timeout)" in fail(ServerSettings(checkpoint, port=0, startup_timeout=1))


@pytest.mark.parametrize(
    ("post", "message"),
    [
        ("sys.exit()", "failed at the first text"),
        ("self.send_response(500); self.end_headers()", "HTTP status 500"),
        ("self.send_response(200); self.end_headers(); self.wfile.write(b'[]')", "failed at the first text"),
        (answer("NaN", 64), "first answer holds NaN"),
        (answer("0.5", 63), "first answer is not a vector"),
    ],
)
def test_a_server_is_ready_only_after_a_valid_vector(checkpoint: Checkpoint, fake_vllm: Path, post: str, message: str) -> None:
    fake_vllm.write_text(SERVER.replace("POST\n", post + "\n"))
    assert message in fail(ServerSettings(checkpoint, port=0))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_children_that_ignore_sigterm_are_killed(
    checkpoint: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor, "STARTING_GRACE", 0.5)
    session = tmp_path / "session"
    fake_vllm.write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork():\n"
        f"    open({str(session)!r}, 'w').write(str(os.getpid()))\n"
        "    print('Initializing a V1 LLM engine', flush=True)\n"
        "time.sleep(600)\n"
    )
    living: list[int] = []

    def interrupt(stage: str) -> None:
        if stage == "starting the engine":
            living.extend(machine.processes(int(session.read_text())))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), supervisor.running(ServerSettings(checkpoint, port=0), interrupt):
        pass
    assert len(living) == 2
    assert machine.processes(int(session.read_text())) == []
    assert list(tmp_path.glob("qembed-vllm-*")) == []


HEALTHY = SERVER.replace("POST\n", answer("0.5", 64) + "\n").replace(
    "HTTPServer(", "import threading, os; COUNT\nHTTPServer("
)  # fmt: skip


def ends(counter: Path, times: int) -> str:
    """A server that answers, and exits after a second in its first `times` runs."""
    count = f"n = os.path.getsize({str(counter)!r}); "
    count += f"open({str(counter)!r}, 'ab').write(b'x'); "
    count += f"n < {times} and threading.Timer(1, lambda: os._exit(7)).start()"
    return HEALTHY.replace("COUNT", count)


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF", (0.0,))


@pytest.mark.usefixtures("_no_pause")
def test_a_server_that_ends_is_restarted_on_the_same_port(checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    counter.touch()
    fake_vllm.write_text(ends(counter, 1))
    warnings: list[str] = []

    def warn(message: str) -> None:
        warnings.append(message)
        if message == "vLLM answers again":
            raise KeyboardInterrupt

    with supervisor.running(ServerSettings(checkpoint, port=0, max_restarts=2)) as server:
        url = server.url
        with pytest.raises(KeyboardInterrupt):
            server.watch(warn=warn)
        assert server.request("GET", "/health", None, 5)[0] == 200
        assert (server.url, server.restarts) == (url, 1)
    assert warnings[0].startswith("vLLM ended: exit code 7, and nothing in its log says why (log: ")
    assert warnings[0].endswith("starting it again in 0 s (1 of 2)")


@pytest.mark.usefixtures("_no_pause")
def test_a_server_that_ends_too_often_is_an_error(checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    counter.touch()
    fake_vllm.write_text(ends(counter, 99))
    with (
        supervisor.running(ServerSettings(checkpoint, port=0, max_restarts=1)) as server,
        pytest.raises(QembedError, match="vLLM ended"),
    ):
        server.watch()
    assert counter.stat().st_size == 2


@pytest.mark.usefixtures("_no_pause")
def test_a_failed_start_counts_as_a_restart(checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    counter.touch()
    fake_vllm.write_text(
        f"import os\nif os.path.getsize({str(counter)!r}): raise ValueError('disk gone')\n" + ends(counter, 1).lstrip()
    )
    with (
        supervisor.running(ServerSettings(checkpoint, port=0, max_restarts=2)) as server,
        pytest.raises(QembedError, match="disk gone"),
    ):
        server.watch()


HANGS = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        FIRST
        self.send_response(200); self.end_headers()
        self.wfile.write(b"qembed_texts_in_flight WAITING\\nqembed_texts_total 3\\n" if self.path == "/metrics" else b"")
    def do_POST(self):
        POST
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
""".replace("POST\n", answer("0.5", 64) + "\n")


@pytest.mark.usefixtures("_no_pause")
@pytest.mark.parametrize(
    ("metrics_code", "waiting", "message"),
    [
        ("", "2", "vLLM hangs: 2 texts waiting, and nothing was computed for"),
        ("if self.path == '/metrics': os.kill(os.getpid(), 19)", "0", "vLLM hangs: it has not answered for"),
    ],
)
def test_a_server_that_hangs_is_restarted(
    checkpoint: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, metrics_code: str, waiting: str, message: str
) -> None:
    monkeypatch.setattr(supervisor, "CHECK_INTERVAL", 0.3)
    fake_vllm.write_text(HANGS.replace("FIRST", metrics_code or "pass").replace("WAITING", waiting))
    warnings: list[str] = []
    with supervisor.running(ServerSettings(checkpoint, port=0, max_restarts=1, hang_timeout=1)) as server:
        before = server.process.pid
        with pytest.raises(QembedError, match=message):
            server.watch(warn=warnings.append)
        assert server.process.pid != before
        assert machine.processes(before) == []
    assert warnings[0].startswith(message)
    assert warnings[0].endswith("starting it again in 0 s (1 of 1)")
    assert warnings[1] == "vLLM answers again"


def test_an_idle_server_is_not_restarted(checkpoint: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "CHECK_INTERVAL", 0.1)
    fake_vllm.write_text(HANGS.replace("FIRST", "pass").replace("WAITING", "0"))
    with supervisor.running(ServerSettings(checkpoint, port=0, max_restarts=0, hang_timeout=0.5)) as server:
        killer = threading.Timer(3, server.process.kill)
        killer.start()
        with pytest.raises(QembedError, match="vLLM ended: it was killed"):
            server.watch()


def test_pauses_between_restarts_grow() -> None:
    assert list(supervisor.BACK_OFF) == sorted(supervisor.BACK_OFF)
    assert supervisor.BACK_OFF[0] < supervisor.BACK_OFF[-1]


def test_vllm_plugins_must_include_a_needed_plugin(
    int8_table: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.touch()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(BadInput, match="VLLM_PLUGINS=other leaves qembed's plugin out"):
        supervisor.check_vllm(ServerSettings(int8_table))
    monkeypatch.setenv("VLLM_PLUGINS", "other,qembed")
    supervisor.check_vllm(ServerSettings(int8_table))


def test_too_little_memory_is_reported_before_anything_starts(
    checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(machine, "target", lambda: Target("cpu", "CPU", 2**30, 2**28))
    monkeypatch.setattr(kernels, "this_cpu", lambda: kernels.Cpu(frozenset({"avx2"}), compiled=True))
    assert fail(ServerSettings(checkpoint, port=0)).startswith("CPU has 256 MiB free, and the plan needs 768 MiB: weights")
    assert not (tmp_path / "ran").exists()


def test_full_shared_memory_is_reported(checkpoint: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.write_text("raise OSError(28, 'No space left on device')")
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_blocks=1000, f_bavail=0, f_frsize=4096))
    message = fail(ServerSettings(checkpoint, port=0))
    assert "No space left" in message
    assert "/dev/shm is full" in message
