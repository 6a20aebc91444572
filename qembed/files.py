"""Files on disk: atomic writes with fsync, and SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 2**20


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`. It is renamed to `path` when the block ends without an error, and deleted otherwise."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`, which appears, or changes, once all of it is on disk.

    Raises:
        OSError: it cannot be written; `path` is unchanged.
    """
    with appearing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        sync(file)


def sync(file: IO[Any]) -> None:
    """Flush `file` and wait until it is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Wait until the file or folder at `path` is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on disk, where the file system supports it."""
    with contextlib.suppress(OSError):
        sync_path(folder)


def sha256(*paths: Path) -> str:
    """The SHA-256 of the bytes of `paths`, one file after the other, in hexadecimal.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
    return digest.hexdigest()
