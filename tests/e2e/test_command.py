"""The output of `--print-command` in a shell, with TLS; and settings that vLLM does not have."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from qembed.vllm import machine, ports
from tests.e2e.launcher import QEMBED, START_SECONDS, STOP_SECONDS, all_gone

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("needs_proc")]
INVALID = ("no-such-setting=5", "max-model=128")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate")
    key, file = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*request, *names, "-keyout", key, "-out", file], check=True, capture_output=True)
    return file, key


def test_the_printed_command_runs_unchanged_in_a_shell(
    int4_checkpoint: Path, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    port = ports.free("127.0.0.1")
    tls = ["--ssl-certfile", certificate[0], "--ssl-keyfile", certificate[1]]
    options = [*("--int4", "--model", int4_checkpoint, "--port", port, "--truncate"), *tls]
    result = subprocess.run(
        [*QEMBED, "serve", *map(str, options), "--print-command"], capture_output=True, text=True, timeout=60, check=True
    )
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with (tmp_path / "log").open("w") as log:
        shell = subprocess.Popen(
            ["bash", "-c", f"exec {result.stdout}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        body = json.dumps({"input": "word " * 9000, "dimensions": 32}).encode()
        request = urllib.request.Request(f"https://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                    content = json.load(answer)
                break
            except urllib.error.HTTPError:
                raise
            except OSError:
                assert shell.poll() is None, (tmp_path / "log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert len(content["data"][0]["embedding"]) == 32
        started = machine.processes(shell.pid)
        shell.send_signal(signal.SIGTERM)
        shell.wait(STOP_SECONDS)
        assert all_gone(started)
    finally:
        for pid in machine.processes(shell.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def refusal(int4_checkpoint: Path) -> subprocess.CompletedProcess[str]:
    """A server with all INVALID settings of vLLM."""
    settings = [word for setting in INVALID for word in ("--engine-arg", setting)]
    command = [*QEMBED, "serve", "--int4", "--model", str(int4_checkpoint), "--port", "0", *settings]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)


@pytest.mark.parametrize("setting", INVALID)
def test_an_unknown_or_abbreviated_setting_of_vllm_is_an_error(refusal: subprocess.CompletedProcess[str], setting: str) -> None:
    assert refusal.returncode == 1
    line = refusal.stderr.splitlines()[-1]
    assert "this vLLM has no setting" in line
    assert setting.split("=")[0] in line.partition("no setting")[2].split(" (log")[0].replace(",", " ").split()
