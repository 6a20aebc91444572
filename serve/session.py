"""One run of `qembed serve`, from the start of the engine until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import click

from qembed.command.signals import Interrupts
from qembed.serve.reporter import Reporter, ready_line
from qembed.vllm import supervisor
from qembed.vllm.settings import ServerSettings


def serve(settings: ServerSettings, reporter: Reporter, as_json: bool) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit code."""
    interrupts = Interrupts()
    serving = False

    def stopping() -> None:
        cause = "SIGTERM" if interrupts.signal == signal.SIGTERM else "Ctrl-C"
        grace = f"; requests in progress have {settings.shutdown_timeout:g} s to finish" if serving else ""
        reporter.note(f"stopping ({cause}){grace}")

    try:
        with (
            interrupts.raised(),
            reporter,
            supervisor.running(settings, reporter.stage, reporter.show_plan, stopping) as server,
            _rereading_keys(server),
        ):
            reporter.end()
            measured = server.measured()
            click.echo(ready_line(server, measured, as_json))
            if measured:
                reporter.measured(server.launch, measured)
            serving = True
            server.watch(reporter.stage, reporter.warn)
    except KeyboardInterrupt:
        reporter.note("stopped")
        return 0 if serving else 128 + interrupts.signal
    return 0


@contextlib.contextmanager
def _rereading_keys(server: supervisor.Server) -> Iterator[None]:
    """Read the file of keys again on SIGHUP, if there is one."""
    if server.launch.settings.key_file is None:
        yield
        return
    previous = signal.signal(signal.SIGHUP, lambda *_: server.reread_keys())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)
