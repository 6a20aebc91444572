"""The files of a run: what each format writes of a window, and how it is made whole at the end.

Every file only grows while the run lasts, so a run that was killed is mended by cutting each at the length that the journal
has. What a format wants to say about the whole (an array's shape, a Parquet file's index) is written last.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qembed.files import sync
from qembed.text import strict_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

VECTORS, IDS, REJECTS, INDEX = "vectors", "ids.jsonl", "rejects.jsonl", "index"
CHUNK_COLUMNS = {"start": "int64", "end": "int64", "page": "int32"}


@dataclass(frozen=True)
class VectorLayout:
    """What the vectors are: `width` numbers each, of numpy's type `element`; `columns` go with them, in this order.

    `about` is said of them where the format has a place for it.
    """

    dtype: str
    element: str
    width: int
    columns: Sequence[str]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class VectorBlock:
    """Vectors [n, width] as they are stored, with their ids, and the other columns by name."""

    vectors: NDArray[Any]
    ids: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def records(self) -> list[dict[str, Any]]:
        """The rows without their vectors."""
        names = list(self.columns)
        return [
            {"id": name, **dict(zip(names, values, strict=True))}
            for name, *values in zip(self.ids, *self.columns.values(), strict=True)
        ]


class Output(ABC):
    """The files of one format in `folder`, each cut at its length in `sizes` (none: not begun)."""

    files: tuple[str, ...] = (VECTORS,)

    def __init__(self, folder: Path, shape: VectorLayout, sizes: Mapping[str, int]) -> None:
        self.folder, self.shape = folder, shape
        self.open = {name: grown(folder / name, sizes.get(name, 0)) for name in self.files}

    @abstractmethod
    def write(self, block: VectorBlock) -> None:
        """Append a window."""

    def unfit(self, block: VectorBlock) -> dict[int, str]:  # noqa: ARG002
        """The places of rows that this format cannot hold, and why."""
        return {}

    def sizes(self) -> dict[str, int]:
        """Bring all to the disk; the files' lengths."""
        for file in self.open.values():
            sync(file)
        return {name: file.tell() for name, file in self.open.items()}

    def finish(self, rows: int) -> None:  # noqa: B027 - most formats say nothing
        """Write what is said about all `rows`. May be done again."""

    def close(self) -> None:
        """Close all files."""
        for file in self.open.values():
            file.close()


def grown(path: Path, size: int) -> IO[bytes]:
    """The file, to be written on from `size` bytes on."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    file = os.fdopen(handle, "r+b")
    file.truncate(size)
    file.seek(size)
    return file


def lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON object a line."""
    return b"".join(strict_json.dumps(record).encode() + b"\n" for record in records)
