"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qembed import sizes
from qembed.checkpoint.find import DEFAULT_MODEL, SAMPLE
from qembed.command.sections import Function
from qembed.errors import BadInput

MODEL_HELP = (
    f"A folder, a hub id, or '{SAMPLE}'. With --int4 a folder that is INT4 itself, or the model whose INT4 folder stands in "
    f"this directory.  [default: what `qembed quantize` made here; with --fp16 its source, or else {DEFAULT_MODEL}]"
)


def json_help(content: str) -> str:
    """The help of --json, which is the same in all commands but for what the object has."""
    return f"Print {content}, on one line and alone on standard output; for an error too."


JSON_HELP = json_help("one JSON object")


class Size(click.ParamType[int]):
    """A size in bytes, written like 3GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        try:
            return value if isinstance(value, int) else sizes.parse(value)
        except BadInput as error:
            self.fail(str(error), param, ctx)


def api_key_file_option(option: Callable[..., Any] = click.option) -> Callable[[Function], Function]:
    """The option --api-key-file of a command that sends requests; `option` is `click.option`, or puts it under a heading."""
    decorator: Callable[[Function], Function] = option(
        "--api-key-file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Key to send to running servers: the first line of FILE.  [default: the first in QEMBED_API_KEY]",
    )
    return decorator


def threads_option(option: Callable[..., Any] = click.option) -> Callable[[Function], Function]:
    """The option --threads of a command that computes; `option` is `click.option`, or puts it under a heading."""
    decorator: Callable[[Function], Function] = option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="Number of CPU threads.  [default: the CPU cores that this process may use, by affinity and quota]",
    )
    return decorator
