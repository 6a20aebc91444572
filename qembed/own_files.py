"""A run's own folder and files: what another user of the machine put in their place is not followed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

from qembed.errors import BadInput


def own_folder(folder: Path) -> None:
    """Create `folder`, or check that it is this user's own folder: another user's links would be followed and files trusted.

    Raises:
        BadInput: it exists, but is not such a folder.
        OSError: it cannot be created.
    """
    try:
        folder.mkdir()
    except FileExistsError:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            what = "belongs to another user" if stat.S_ISDIR(status.st_mode) else "not a folder"
            raise BadInput(f"{folder}: {what}; remove it, or choose another --output") from None


def own_file(path: Path, flags: int) -> IO[bytes]:
    """The file in a run's folder, opened with `flags`; a link there leads to a file of somebody else's.

    Raises:
        BadInput: it is a link, or no regular file.
        OSError: it cannot be opened.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise BadInput(f"{path}: not a regular file; {start_anew(path.parent)}") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadInput(f"{path}: not a regular file; {start_anew(path.parent)}")
    return os.fdopen(handle, "rb" if not flags & os.O_RDWR else "a+b" if flags & os.O_APPEND else "r+b")


def start_anew(folder: Path) -> str:
    """What to do if the run in `folder` cannot be resumed."""
    return f"delete {folder} to start anew"
