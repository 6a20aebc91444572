"""What the launcher does when vLLM misbehaves. The stand-in for vLLM only fails; what works is tested with the real one."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput, QembedError
from qembed.vllm import machine, supervisor
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
    """What a server does that answers with a vector of `length` times `number`."""
    body = f'{{"data": [{{"embedding": [{", ".join([number] * length)}]}}]}}'
    return f"self.send_response(200); self.end_headers(); self.wfile.write({body.encode()!r})"


def fail(settings: ServerSettings) -> str:
    """The message that starting ends with."""
    with pytest.raises(QembedError) as caught, supervisor.running(settings):
        pass
    return str(caught.value)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_taken_port_is_told_before_anything_is_started(checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path) -> None:
    fake_vllm.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(QembedError, match=f"port {port} of 127.0.0.1 is taken; choose another with --port"):
            supervisor.running(ServerSettings(checkpoint, port=port)).__enter__()
    assert not (tmp_path / "ran").exists()


def test_a_host_that_is_not_ours_is_told(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.touch()
    with pytest.raises(BadInput, match=r"192\.0\.2\.1"):
        supervisor.running(ServerSettings(checkpoint, host="192.0.2.1")).__enter__()


def test_vllm_that_dies_is_told_in_one_line_with_cause_and_log(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("raise ValueError('no such weight')")
    said = fail(ServerSettings(checkpoint, port=0))
    assert said.startswith("vLLM did not start: ValueError: no such weight (log: ")
    assert "\n" not in said
    kept = Path(said.rpartition("log: ")[2].rstrip(")"))
    assert "Traceback" in kept.read_text()


def test_vllm_that_is_killed_is_told(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("import os; os.kill(os.getpid(), 9)")
    assert "killed (signal 9), as the system does when memory runs out" in fail(ServerSettings(checkpoint, port=0))


def test_vllm_that_does_not_answer_in_time_is_ended(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("import time; time.sleep(600)")
    assert "did not answer within 1 s (--startup-timeout)" in fail(ServerSettings(checkpoint, port=0, startup_timeout=1))


@pytest.mark.parametrize(
    ("post", "told"),
    [
        ("sys.exit()", "failed at the first text"),
        ("self.send_response(500); self.end_headers()", "HTTP status 500"),
        ("self.send_response(200); self.end_headers(); self.wfile.write(b'[]')", "failed at the first text"),
        (answer("NaN", 64), "first answer is no vector"),
        (answer("0.5", 63), "first answer is no vector"),
    ],
)
def test_a_server_is_ready_only_after_it_gave_a_vector(checkpoint: Checkpoint, fake_vllm: Path, post: str, told: str) -> None:
    fake_vllm.write_text(SERVER.replace("POST\n", post + "\n"))
    assert told in fail(ServerSettings(checkpoint, port=0))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_children_that_ignore_sigterm_are_ended_too(
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


WELL = SERVER.replace("POST\n", answer("0.5", 64) + "\n").replace(
    "HTTPServer(", "import threading, os; COUNT\nHTTPServer("
)  # fmt: skip


def ends(counter: Path, times: int) -> str:
    """A server that answers, and ends by itself the first `times` times."""
    count = f"n = os.path.getsize({str(counter)!r}); "
    count += f"open({str(counter)!r}, 'ab').write(b'x'); "
    count += f"n < {times} and threading.Timer(1, lambda: os._exit(7)).start()"
    return WELL.replace("COUNT", count)


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF", (0.0,))


@pytest.mark.usefixtures("_no_pause")
def test_a_server_that_ends_is_started_again_on_the_same_port(checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    counter.touch()
    fake_vllm.write_text(ends(counter, 1))
    said: list[str] = []

    def warn(what: str) -> None:
        said.append(what)
        if what == "vLLM answers again":
            raise KeyboardInterrupt

    with supervisor.running(ServerSettings(checkpoint, port=0, max_restarts=2)) as server:
        url = server.url
        with pytest.raises(KeyboardInterrupt):
            server.watch(warn=warn)
        assert server.request("GET", "/health", None, 5)[0] == 200
        assert (server.url, server.restarts) == (url, 1)
    assert said[0].startswith("vLLM ended: exit code 7, and nothing in its log says why (log: ")
    assert said[0].endswith("starting it again in 0 s (1 of 2)")


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
def test_a_start_that_fails_counts_as_an_end(checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pause")
@pytest.mark.parametrize(
    ("first", "waiting", "told"),
    [
        ("", "2", "vLLM hangs: 2 texts wait, and nothing was computed for"),
        ("if self.path == '/metrics': os.kill(os.getpid(), 19)", "0", "vLLM hangs: it has not answered for"),
    ],
)
def test_a_server_that_hangs_is_started_again(
    checkpoint: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, first: str, waiting: str, told: str
) -> None:
    monkeypatch.setattr(supervisor, "LOOK_EVERY", 0.3)
    fake_vllm.write_text(HANGS.replace("FIRST", first or "pass").replace("WAITING", waiting))
    said: list[str] = []
    with supervisor.running(ServerSettings(checkpoint, port=0, max_restarts=1, hang_timeout=1)) as server:
        before = server.process.pid
        with pytest.raises(QembedError, match=told):
            server.watch(warn=said.append)
        assert server.process.pid != before
        assert machine.processes(before) == []
    assert said[0].startswith(told)
    assert said[0].endswith("starting it again in 0 s (1 of 1)")
    assert said[1] == "vLLM answers again"


def test_a_server_that_nobody_waits_for_is_let_be(
    checkpoint: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOOK_EVERY", 0.1)
    fake_vllm.write_text(HANGS.replace("FIRST", "pass").replace("WAITING", "0"))
    with supervisor.running(ServerSettings(checkpoint, port=0, max_restarts=0, hang_timeout=0.5)) as server:
        ended = threading.Timer(3, server.process.kill)
        ended.start()
        with pytest.raises(QembedError, match="vLLM ended: it was killed"):
            server.watch()


def test_pauses_between_restarts_grow() -> None:
    assert list(supervisor.BACK_OFF) == sorted(supervisor.BACK_OFF)
    assert supervisor.BACK_OFF[0] < supervisor.BACK_OFF[-1]


def test_a_plugin_that_is_needed_and_left_out_is_told(
    int8_table: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.touch()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(BadInput, match="VLLM_PLUGINS=other leaves qembed's plugin out"):
        supervisor.check_vllm(ServerSettings(int8_table))
    monkeypatch.setenv("VLLM_PLUGINS", "other,qembed")
    supervisor.check_vllm(ServerSettings(int8_table))


def test_too_little_memory_is_told_before_anything_is_started(
    checkpoint: Checkpoint, fake_vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(machine, "target", lambda: Target("cpu", "CPU", 2**30, 2**28))
    assert fail(ServerSettings(checkpoint, port=0)).startswith("CPU has 256 MiB free, and the plan needs 1.5 GiB: weights")
    assert not (tmp_path / "ran").exists()
