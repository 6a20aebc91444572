"""What the launcher does when vLLM misbehaves. The stand-in for vLLM only fails; what works is tested with the real one."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from qembed.checkpoint import Checkpoint
from qembed.errors import BadInput, QembedError
from qembed.serve import engine, machine
from qembed.serve.settings import Settings

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


def fail(settings: Settings) -> str:
    """The message that starting ends with."""
    with pytest.raises(QembedError) as caught, engine.running(settings):
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
            engine.running(Settings(checkpoint, port=port)).__enter__()
    assert not (tmp_path / "ran").exists()


def test_a_host_that_is_not_ours_is_told(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.touch()
    with pytest.raises(BadInput, match=r"192\.0\.2\.1"):
        engine.running(Settings(checkpoint, host="192.0.2.1")).__enter__()


def test_vllm_that_dies_is_told_in_one_line_with_cause_and_log(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("raise ValueError('no such weight')")
    said = fail(Settings(checkpoint, port=0))
    assert said.startswith("vLLM did not start: ValueError: no such weight (log: ")
    assert "\n" not in said
    kept = Path(said.rpartition("log: ")[2].rstrip(")"))
    assert "Traceback" in kept.read_text()


def test_vllm_that_is_killed_is_told(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("import os; os.kill(os.getpid(), 9)")
    assert "killed (signal 9), as the system does when memory runs out" in fail(Settings(checkpoint, port=0))


def test_vllm_that_does_not_answer_in_time_is_ended(checkpoint: Checkpoint, fake_vllm: Path) -> None:
    fake_vllm.write_text("import time; time.sleep(600)")
    assert "did not answer within 1 s (--startup-timeout)" in fail(Settings(checkpoint, port=0, startup_timeout=1))


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
    assert told in fail(Settings(checkpoint, port=0))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_children_that_ignore_sigterm_are_ended_too(
    checkpoint: Checkpoint, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "STARTING_GRACE", 0.5)
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

    with pytest.raises(KeyboardInterrupt), engine.running(Settings(checkpoint, port=0), interrupt):
        pass
    assert len(living) == 2
    assert machine.processes(int(session.read_text())) == []
    assert list(tmp_path.glob("qembed-vllm-*")) == []
