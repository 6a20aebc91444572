"""Report files: checked before the work begins, written atomically at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from qembed.errors import BadInput, QembedError, unwritable
from qembed.files import write_atomically

KINDS = (".html", ".json", ".md")


def check(path: Path) -> None:
    """Check that a report can be written to `path`, before long work begins.

    Raises:
        BadInput: unknown suffix, the folder is missing, or it is not writable.
        QembedError: the disk is full.
    """
    if path.suffix.lower() not in KINDS:
        raise BadInput(f"--report {path}: name it {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if path.is_dir():
        raise BadInput(f"--report {path}: a folder")
    if not path.parent.is_dir():
        raise BadInput(f"--report {path}: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(f"--report {path}: {path.parent} cannot be written", error) from error


def write_all(writes: Iterable[tuple[str, Callable[[], object]]]) -> None:
    """Write several files, each given as a line that announces it on stderr and a function that writes it.

    A file that cannot be written does not stop the others.

    Raises:
        QembedError: some cannot be written; the message names all of them.
    """
    errors = []
    for line, write in writes:
        try:
            write()
        except QembedError as error:
            errors.append(error)
        else:
            click.echo(line, err=True)
    if errors:
        raise type(errors[0])("; ".join(map(str, errors)))


def replace(path: Path, content: str) -> None:
    """Write `content` to `path` atomically.

    Raises:
        QembedError: it cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise QembedError(f"{path}: cannot be written: {error.strerror or error}") from error
