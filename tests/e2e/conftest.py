"""One INT4 checkpoint and one real vLLM for the whole session: each takes most of a minute to make."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.launcher import QEMBED, Launched


@pytest.fixture(scope="session", autouse=True)
def eval_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No `qembed eval` of a test leaves vectors in the user's own cache."""
    os.environ["QEMBED_EVAL_CACHE"] = str(tmp_path_factory.mktemp("eval-cache"))


@pytest.fixture(scope="session")
def int4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `qembed quantize --model sample` writes; QEMBED_TEST_INT4 names another INT4 folder to test with."""
    given = os.environ.get("QEMBED_TEST_INT4")
    if given:
        return Path(given).resolve()
    folder = tmp_path_factory.mktemp("quantized") / "sample-AWQ-INT4"
    done = subprocess.run(
        [*QEMBED, "quantize", "--model", "sample", "--output", folder],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def int4_server(int4_checkpoint: Path) -> Iterator[Launched]:
    """`qembed serve --int4` of that checkpoint, ready; the dtype and the kernel are what this machine gets by default."""
    with Launched("--int4", "--model", int4_checkpoint, "--port", 0, "--json") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="session")
def needs_proc() -> None:
    """Tests that count processes read /proc."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
