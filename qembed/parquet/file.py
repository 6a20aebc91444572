"""Parquet files, which are read in another process (`parquet.worker`): a file of 1 KB can unpack to gigabytes.

The worker sends batches in Arrow's stream format, of bounded size. One that has ended its file is used for the next one.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qembed.child.process import Process, TooMuch
from qembed.errors import BadInput, MissingExtra
from qembed.installation import how_to_install
from qembed.parquet.worker import BATCH, DAMAGED, DESCRIBED, END, LARGE_ROW, LARGEST_BATCH, MOST_VALUES, SYSTEM

MEMORY = 2**31
"""Bytes of the address space of the worker."""
SECONDS = 60
"""Computing time for a batch."""
PATIENCE = 5.0
"""Times the computing time that may pass on the clock."""
ROWS_PER_BYTE, ROWS_OF_ANY_FILE = 100, 2**20
"""A file of this many bytes can have so many rows, and a small one so many. Rows that are all alike take no room in a file."""
SHOWN_ERROR = 200
TOO_LARGE = f"larger than {LARGEST_BATCH >> 20} MiB, or has more than {MOST_VALUES:,} values"
"""Why a row is not read."""


@dataclass(frozen=True)
class Group:
    """A row group: its rows, and the bytes of each column once it is unpacked, as the file says."""

    rows: int
    sizes: dict[str, int]


class ParquetFile:
    """An open Parquet file called `name` in messages; use `opened`.

    Attributes:
        rows: their number, as the file says.
        schema: Arrow's.
        uuids: columns of UUIDs, also those that this version of Arrow reads as plain bytes.
        groups: the row groups.
    """

    def __init__(self, name: str, path: Path, process: Process, texts_as_dictionary: bool) -> None:
        import pyarrow

        self.name, self._process = name, process
        _, answer = self._ask("open", str(path), texts_as_dictionary)
        rows, schema, uuids, groups = json.loads(answer)
        self.rows: int = rows
        self.schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(base64.b64decode(schema)))
        self.uuids = frozenset(uuids)
        self.groups = [Group(*group) for group in groups]

    def batches(self, rows: int, columns: Sequence[str]) -> Iterator[Any]:
        """Arrow record batches of `columns`, of at most `rows` rows; None for a row that is larger than is read.

        Raises:
            BadInput: the file is damaged, or takes too much memory or time.
        """
        self._ask("begin", list(columns), self._batch_size(rows, columns))
        while (answer := self._ask("next"))[0] != END:
            yield None if answer[0] == LARGE_ROW else _batch(answer[1])

    def take(self, group: int, columns: Sequence[str], rows: Sequence[int]) -> Any:
        """An Arrow record batch of some rows of a row group, by their number in it.

        Raises:
            BadInput: as `batches`, and where the rows are larger than is read.
        """
        status, content = self._ask("take", group, list(columns), list(rows))
        if status == LARGE_ROW:
            raise BadInput(f"{self.name}: some rows are {TOO_LARGE}")
        return _batch(content)

    def _batch_size(self, rows: int, columns: Sequence[str]) -> int:
        """At most `rows`, fewer where the columns are large. The file says how large; if it lies, the worker ends."""
        average = max(
            (sum(group.sizes.get(name, 0) for name in columns) / max(group.rows, 1) for group in self.groups), default=0
        )
        return max(1, min(rows, int(LARGEST_BATCH / max(average, 1))))

    def _ask(self, kind: str, *arguments: Any) -> tuple[bytes, bytes]:
        try:
            status, content = self._process.ask(kind, json.dumps(arguments).encode(), SECONDS)
        except TooMuch as error:
            raise BadInput(f"{self.name}: {error}") from error
        if status == SYSTEM:
            number = int(content)
            raise BadInput(f"{self.name}: cannot be read: {os.strerror(number)}")
        if status not in (BATCH, END, DESCRIBED, LARGE_ROW):
            reason = " ".join(content.decode(errors="replace").split())[:SHOWN_ERROR]
            raise BadInput(f"{self.name}: not a Parquet file, or damaged: {reason if status == DAMAGED else ''}")
        return status, content


@contextmanager
def opened(path: Path, name: str | None = None, texts_as_dictionary: bool = False) -> Iterator[ParquetFile]:
    """The open file. `texts_as_dictionary`: columns of texts and bytes are Arrow dictionaries, each value once for a batch.

    Raises:
        BadInput: it is no regular file, cannot be read, is not Parquet, is damaged, takes too much memory or time, or has more
            rows than a file of its size can have.
        MissingExtra: pyarrow is not installed.
        QembedError: no process can be started.
    """
    name = name or str(path)
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{name}: reading Parquet needs pyarrow; install it: {how_to_install('parquet')}") from error
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f"{name}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{name}: not a regular file; Parquet has its index at the end")
    process = _taken()
    try:
        file = ParquetFile(name, path.absolute(), process, texts_as_dictionary)
        most = ROWS_OF_ANY_FILE + ROWS_PER_BYTE * status.st_size
        if not 0 <= file.rows <= most:
            raise BadInput(f"{name}: {file.rows:,} rows in {status.st_size:,} bytes; at most {most:,} are read")
        yield file
    finally:
        _returned(process)


def close() -> None:
    """End the workers that have no file open."""
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.owner == os.getpid():
                process.end()


def _taken() -> Process:
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.is_usable(MEMORY):
                return process
            if process.owner == os.getpid():
                process.end()
    # Arrow's other allocators reserve much more address space than they use.
    return Process("qembed.parquet.worker", MEMORY, PATIENCE, "reads Parquet", {"ARROW_DEFAULT_MEMORY_POOL": "system"})


def _returned(process: Process) -> None:
    if process.is_usable(MEMORY):
        with _lock:
            _idle.append(process)
    elif process.owner == os.getpid():
        process.end()


def _batch(content: bytes) -> Any:
    import pyarrow

    with pyarrow.ipc.open_stream(pyarrow.py_buffer(content)) as reader:
        return reader.read_next_batch()


_lock = threading.Lock()
_idle: list[Process] = []
atexit.register(close)
