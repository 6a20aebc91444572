"""Finished batches of the current window on disk, because on a slow machine a window takes too long to lose."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qembed.own_files import own_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEAD = struct.Struct("<IIIIII")  # window, batch, rows, columns, bytes of reasons, CRC-32 of what follows
FILES = ("batches-0", "batches-1")
WRITE_SECONDS = 5.0
"""Seconds of computing that may be lost. Batches are written no more often than this: a fast machine writes none."""

Result = tuple["NDArray[np.float32]", dict[int, str]]
"""The vectors of a batch [n, d], and the reasons for texts without one, by index."""


class Spool:
    """Batches of windows in two alternating files: one window is written to the output while the next is computed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: list[bytes] = []
        self._window = -1
        self._since = 0.0

    def begin(self, window: int) -> dict[int, Result]:
        """Switch to a window; returns its batches that are already on disk, by number."""
        self._window, self._waiting, self._since = window, [], time.monotonic()
        path = self._path()
        if not os.path.lexists(path):
            return {}
        with own_file(path, os.O_RDWR) as file:
            batches, end = _read(file, window)
            file.truncate(end)
        return batches

    def put(self, batch: int, result: Result, *, at_once: bool = False) -> None:
        """Store a batch; it is on disk within WRITE_SECONDS plus the time of one batch, or with `at_once` on return."""
        vectors, reasons = result
        encoded_reasons = json.dumps(reasons).encode() if reasons else b""
        body = encoded_reasons + vectors.tobytes()
        head = HEAD.pack(self._window, batch, *vectors.shape, len(encoded_reasons), zlib.crc32(body))
        self._waiting.append(head + body)
        if at_once or time.monotonic() - self._since >= WRITE_SECONDS:
            with own_file(self._path(), os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
                file.writelines(self._waiting)
                file.flush()
                os.fsync(file.fileno())
            self._waiting, self._since = [], time.monotonic()

    def _path(self) -> Path:
        return self._folder / FILES[self._window % 2]


def _read(file: IO[bytes], window: int) -> tuple[dict[int, Result], int]:
    """The batches of `window`, and the end of the last complete one."""
    import numpy as np

    batches: dict[int, Result] = {}
    end, length = 0, os.fstat(file.fileno()).st_size
    while len(head := file.read(HEAD.size)) == HEAD.size:
        batch_window, batch, rows, columns, reason_bytes, crc = HEAD.unpack(head)
        size = reason_bytes + 4 * rows * columns
        if batch_window != window or size > length - file.tell():
            break
        body = file.read(size)
        if zlib.crc32(body) != crc:
            break
        try:
            reasons = (
                {int(place): str(reason) for place, reason in json.loads(body[:reason_bytes]).items()} if reason_bytes else {}
            )
        except (ValueError, AttributeError, RecursionError):
            break
        vectors = (
            np.frombuffer(body, np.float32, offset=reason_bytes)
            if reason_bytes % 4 == 0
            else np.frombuffer(body[reason_bytes:], np.float32)
        )
        batches[batch] = (vectors.reshape(rows, columns), reasons)
        end = file.tell()
    return batches, end
