"""A run of `qembed serve`, with a stand-in for the server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.serve import session
from qembed.serve.reporter import Reporter
from qembed.vllm.settings import ServerSettings


def test_a_hangup_while_the_server_starts_does_not_end_it(
    int4: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rereads = []

    def watch(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        raise KeyboardInterrupt

    @contextmanager
    def running(*_: Any) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGHUP)
        yield SimpleNamespace(measured=dict, watch=watch, reread_keys=lambda: rereads.append(True))

    monkeypatch.setattr(session.supervisor, "running", running)
    monkeypatch.setattr(session, "ready_line", lambda *_: "ready")
    previous = signal.signal(signal.SIGHUP, lambda *_: pytest.fail("a hangup that nobody handles"))
    try:
        settings = ServerSettings(int4, key_file=tmp_path / "keys")
        assert session.serve(settings, Reporter("json"), False) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert rereads == [True]
