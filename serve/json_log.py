"""`--log-format json`: what a command says on stderr is one JSON object per line, its errors and Python's warnings too."""

from __future__ import annotations

import itertools
import sys
import warnings
from typing import Any

import click

from qembed.command.sections import SectionedCommand
from qembed.errors import QembedError
from qembed.vllm import log


class JsonLogCommand(SectionedCommand):
    """A command whose errors are JSON, one a line, with `--log-format json`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the arguments; a mistake in them is a line of JSON if they ask for it."""
        is_json = "--log-format=json" in args or ("--log-format", "json") in itertools.pairwise(args)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            if not is_json:
                raise
            log.event(error.format_message(), "error")
            sys.exit(error.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if ctx.params.get("log_format") != "json":
            return super().invoke(ctx)
        warnings.showwarning = lambda message, *_, **__: log.event(str(message), "warning")
        try:
            return super().invoke(ctx)
        except QembedError as error:
            log.event(str(error), "error")
            ctx.exit(error.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - it is reported, and sets the exit code
            message = error.strerror if isinstance(error, OSError) else None
            log.event(message or f"unexpected: {type(error).__name__}: {error}", "error")
            ctx.exit(1)
