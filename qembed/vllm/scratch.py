"""The temporary folder of one start of the server, and what its processes leave in /dev/shm.

vLLM's processes make sockets, a file for their rendezvous, shared memory and semaphores, and leave them behind when they are
killed. So each start has a TMPDIR of its own, which the launcher removes. If the launcher itself is killed, the next one does:
a folder is in use as long as its file `lock` is locked. The file `shared` names what the processes use in /dev/shm.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

PREFIX = "qembed-vllm-"
LOCK, SHARED = "lock", "shared"
SHARED_NAME = re.compile(r"/dev/shm/[\w.+-]+", re.ASCII)  # noqa: S108 - never opened here
LONGEST = 60
"""Bytes of a folder's name that leave room for a socket's name (107 in all)."""
SHORT = Path("/tmp")  # noqa: S108 - mkdtemp makes a folder of its own in it


class Scratch:
    """A new folder, in the system's folder for temporary files.

    Attributes:
        folder: the folder.
        log: a file beside it, for the server's log.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        if len(os.fsencode(parent)) + len(PREFIX) + 9 > LONGEST and SHORT.is_dir():
            parent = SHORT
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self.log = Path(tempfile.gettempdir(), f"{self.folder.name}.log")
        self._shared: set[Path] = set()
        lock = self.folder / f"{LOCK}.new"
        self._lock = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        lock.rename(self.folder / LOCK)  # locked before it has the name that others look for
        os.close(os.open(self.log, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def note(self, shared: Iterable[Path]) -> None:
        """Note files in /dev/shm that the server's processes use, to be removed with the folder."""
        self._shared.update(shared)
        names = "".join(f"{path}\n" for path in sorted(self._shared))
        with contextlib.suppress(OSError, UnicodeEncodeError):
            (self.folder / SHARED).write_text(names, encoding="utf-8")

    def remove(self) -> None:
        """Remove the folder and the files noted; all processes of the server have ended. The log stays."""
        _remove(self.folder, self._shared)
        os.close(self._lock)


def remove_abandoned() -> None:
    """Remove what launchers of this user left behind that were killed, with their logs."""
    for parent in {Path(tempfile.gettempdir()), SHORT}:
        for folder in parent.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shared = folder / SHARED
        lines = shared.read_text(encoding="utf-8").splitlines() if shared.is_file() else []
        _remove(folder, {Path(line) for line in lines if SHARED_NAME.fullmatch(line)})
        Path(tempfile.gettempdir(), f"{folder.name}.log").unlink(missing_ok=True)
    finally:
        os.close(lock)


def _remove(folder: Path, shared: Iterable[Path]) -> None:
    for path in shared:
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
