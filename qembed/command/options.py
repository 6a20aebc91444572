"""Options that several commands share."""

from __future__ import annotations

from typing import Any

import click

from qembed import sizes
from qembed.checkpoint.find import DEFAULT_MODEL, SAMPLE
from qembed.errors import BadInput

MODEL_HELP = (
    f"A folder, a hub id, or '{SAMPLE}'. With --int4 a folder that is INT4 itself, or the model whose INT4 folder stands in "
    f"this directory.  [default: what `qembed quantize` made here; with --fp16 its source, or else {DEFAULT_MODEL}]"
)

JSON_HELP = "Print one JSON object, on one line and alone on standard output; for an error too."


class Size(click.ParamType[int]):
    """A size in bytes, written like 3GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        try:
            return value if isinstance(value, int) else sizes.parse(value)
        except BadInput as error:
            self.fail(str(error), param, ctx)
