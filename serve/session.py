"""One run of `qembed serve`, from the start of the engine until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence

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

    servers: list[supervisor.Server] = []
    try:
        with (
            interrupts.raised(),
            reporter,
            _rereading_keys(settings, servers),
            supervisor.running(settings, reporter.stage, reporter.show_plan, stopping) as server,
        ):
            servers.append(server)
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
def _rereading_keys(settings: ServerSettings, servers: Sequence[supervisor.Server]) -> Iterator[None]:
    """Have `servers` read the file of keys again on SIGHUP, if there is one.

    A server that is only starting is not among them, and reads its file anyway once it serves.
    """

    def reread(*_: object) -> None:
        for server in servers:
            server.reread_keys()

    if settings.key_file is None:
        yield
        return
    previous = signal.signal(signal.SIGHUP, reread)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)
