"""Report files: checked before the work begins, written atomically at the end."""

from __future__ import annotations

import tempfile
from pathlib import Path

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


def replace(path: Path, content: str) -> None:
    """Write `content` to `path` atomically.

    Raises:
        QembedError: it cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise QembedError(f"{path}: cannot be written: {error.strerror or error}") from error
