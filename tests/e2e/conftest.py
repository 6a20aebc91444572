"""A real vLLM shared by the whole session, because each start takes ten seconds of a core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.launcher import Launched


@pytest.fixture(scope="session", autouse=True)
def eval_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep `qembed eval` in tests out of the user's cache."""
    os.environ["QEMBED_EVAL_CACHE"] = str(tmp_path_factory.mktemp("eval-cache"))


@pytest.fixture(scope="session")
def int4_server(int4_checkpoint: Path) -> Iterator[Launched]:
    """A ready `qembed serve --int4` of `int4_checkpoint`, with the default dtype and kernel of this machine."""
    with Launched("--int4", "--model", int4_checkpoint, "--port", 0, "--json") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="session")
def needs_proc() -> None:
    """Tests that count processes read /proc."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
