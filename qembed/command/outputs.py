"""What a command writes must not replace what it reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qembed.errors import BadInput


def refuse_inputs(option: str, outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that none of `outputs` is one of the files `inputs` by any name: links, `./`, another mount.

    Raises:
        BadInput: one is.
    """
    sources = list(inputs)
    for output in outputs:
        for source in sources:
            if is_same(output, source):
                raise BadInput(f"{option} {output}: is the input {source}, which would be lost; choose another name")


def is_same(first: Path, second: Path) -> bool:
    """Whether both paths lead to one existing file or folder."""
    try:
        return first.samefile(second)
    except OSError:
        return False
