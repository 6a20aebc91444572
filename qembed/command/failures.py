"""Reports of failed commands: one line on stderr, an exit code, and with --json also an object on stdout."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from qembed.errors import QembedError
from qembed.installation import how_to_install
from qembed.text import strict_json
from qembed.text.display import escaped

INTERRUPTED = 130
LINES = "\t\n"
"""Control characters that a message may have."""
LONGEST = 2000
"""Characters of a message. What is quoted from a file may be of any length."""
RESULT = "qembed_result"
"""The attribute of an error with what the command computed before it failed (`keeping`)."""


@dataclass(frozen=True)
class Failure:
    """Why a command ends: the message (one line), the exit code, and the name of the error's type."""

    message: str
    exit_code: int
    type: str

    def as_json(self, result: Mapping[str, Any] | None = None) -> str:
        """`{"error": {"message": …, "exit_code": …, "type": …}}` on one line, after the keys of `result` if there is one."""
        error = {"message": self.message, "exit_code": self.exit_code, "type": self.type}
        return strict_json.dumps({**(result or {}), "error": error})


def failure(error: BaseException) -> Failure | None:
    """The message and exit code for `error`; None for exceptions that are no failures: click's Exit and a closed pipe."""
    name = type(error).__name__
    match error:
        case QembedError():
            return Failure(escaped(_shortened(str(error)), LINES), error.exit_code, name)
        case click.exceptions.Exit() | BrokenPipeError():
            return None
        case click.ClickException():
            return Failure(error.format_message(), error.exit_code, "UsageError" if error.exit_code == 2 else name)
        case KeyboardInterrupt() | click.Abort():  # before the command could describe unfinished work
            return Failure("interrupted", INTERRUPTED, "Interrupted")
        case ModuleNotFoundError() if not (error.name or "").startswith("qembed"):
            return Failure(f"{error.name} is not installed, which qembed needs: {how_to_install()}", 3, "MissingExtra")
        case OSError():
            return Failure(f"{error.filename or 'input or output'}: {error.strerror or error}", 1, name)
        case Exception():
            reason = " ".join(f"{name}: {error}".split())[:300]
            return Failure(f"unexpected: {reason} (a fault of qembed's; `qembed --debug …` shows where)", 1, name)
    return None


def _shortened(message: str) -> str:
    """`message` without its middle if it is longer than LONGEST: it begins with the place, and ends with what to do."""
    half = LONGEST // 2
    return message if len(message) <= LONGEST else f"{message[:half]} … {message[-half:]}"


@contextmanager
def keeping(result: Mapping[str, Any]) -> Iterator[None]:
    """If the block fails, keep `result` with the error: --json then prints both, in one object."""
    try:
        yield
    except BaseException as error:
        setattr(error, RESULT, result)
        raise


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for JSON. It is searched as text, because parsing it may be what failed."""
    options = list(arguments)
    return "--json" in (options[: options.index("--")] if "--" in options else options)


def wants_json_log(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for a log in JSON."""
    return "--log-format=json" in arguments or ("--log-format", "json") in itertools.pairwise(arguments)


def report(error: BaseException, *, as_json: bool) -> int | None:
    """Print `error` to stderr, and with `as_json` to stdout too; returns the exit code, None if `error` is no failure.

    click's own errors are left to click's `show`, which prints the usage as well.
    """
    described = failure(error)
    if described is None:
        return None
    if as_json:
        click.echo(described.as_json(getattr(error, RESULT, None)))
        sys.stdout.flush()
    if isinstance(error, click.ClickException):
        error.show()
    else:
        click.echo(f"qembed: {described.message}", err=True)
    return described.exit_code
