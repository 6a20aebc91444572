"""`--log-format json`: what a command says on stderr is one JSON object per line, errors and what libraries write there too."""

from __future__ import annotations

import io
import json
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

from qembed.command import failures
from qembed.command.sections import SectionedCommand
from qembed.vllm import log


class JsonLogCommand(SectionedCommand):
    """A command whose stderr is JSON, one object a line, with `--log-format json`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the arguments; a mistake in them is a line of JSON if they ask for it."""
        is_json, as_json = failures.wants_json_log(args), failures.wants_json(args)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            if not is_json:
                raise
            sys.exit(_report(error, as_json=as_json))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if ctx.params.get("log_format") != "json":
            return super().invoke(ctx)
        with _json_stderr():
            try:
                return super().invoke(ctx)
            except BaseException as error:
                exit_code = _report(error, as_json=ctx.params["as_json"], with_traceback=ctx.find_root().params.get("debug"))
                if exit_code is None:
                    raise
                ctx.exit(exit_code)


def _report(error: BaseException, *, as_json: bool, with_traceback: bool | None = False) -> int | None:
    """Log `error`, and with `as_json` print it to stdout too; returns the exit code, None if `error` is no failure."""
    described = failures.failure(error)
    if described is None:
        return None
    if as_json:
        click.echo(described.as_json())
        sys.stdout.flush()
    fields = {"traceback": "".join(traceback.format_exception(error))} if with_traceback else {}
    log.event(described.message, "error", **fields)
    return described.exit_code


@contextmanager
def _json_stderr() -> Iterator[None]:
    """Inside the block, each line that is written to `sys.stderr` becomes an event, unless it is one."""
    stream, show = sys.stderr, warnings.showwarning
    sys.stderr = wrapped = _Events(stream)
    warnings.showwarning = lambda message, *_, **__: log.event(str(message), "warning")
    try:
        yield
    finally:
        wrapped.end()
        sys.stderr, warnings.showwarning = stream, show


class _Events(io.TextIOBase):
    """A text stream that passes JSON objects on to `stream`, and writes other lines as events."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._incomplete = stream, ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Write the lines that are complete; progress bars end theirs with a carriage return."""
        length = len(text)
        with self._lock:
            if text.startswith("{") and text.endswith("\n"):  # an event, which does not continue what a library left open
                text = f"\n{text}"
            *lines, self._incomplete = (self._incomplete + text.replace("\r", "\n")).split("\n")
            for line in lines:
                if line.strip():
                    self._stream.write(_event(line) + "\n")
        return length

    def end(self) -> None:
        """Write what has no end of a line yet."""
        self.write("\n")
        self.flush()

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def writable(self) -> bool:
        """True: a text stream to write to."""
        return True

    def fileno(self) -> int:
        """The stream's file descriptor."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self._stream.encoding


def _event(line: str) -> str:
    try:
        if isinstance(json.loads(line), dict):
            return line
    except ValueError:
        pass
    return log.event_line(log.plain(line), "warning")
