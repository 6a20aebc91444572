"""The files of a run. Each format appends windows (`write`) and completes its files at the end (`finish`).

Files only grow during a run, so a killed run is repaired by truncating each to the length in the journal. What a format stores
about the whole (the shape of an array, the index of a Parquet file) is written last.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qembed.errors import BadInput
from qembed.files import sync
from qembed.own_files import own_file, start_anew
from qembed.text import strict_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

VECTORS, IDS, REJECTS, INDEX = "vectors", "ids.jsonl", "rejects.jsonl", "index"
CHUNK_COLUMNS = {"start": "int64", "end": "int64", "page": "int32"}


@dataclass(frozen=True)
class VectorLayout:
    """The layout of the vectors: `width` numbers of numpy's type `element`, with `columns` in this order.

    `about` is metadata, stored if the format has a place for it.
    """

    dtype: str
    element: str
    width: int
    columns: Sequence[str]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class VectorBlock:
    """Vectors [n, width] as stored, with their ids, and the other columns by name."""

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
    """The files of a format in `folder`, truncated to their lengths in `sizes` (missing: new)."""

    files: tuple[str, ...] = (VECTORS,)

    def __init__(self, folder: Path, shape: VectorLayout, sizes: Mapping[str, int]) -> None:
        self.folder, self.shape = folder, shape
        self.open = {name: open_truncated(folder / name, sizes.get(name, 0)) for name in self.files}

    @abstractmethod
    def write(self, block: VectorBlock) -> None:
        """Append a window."""

    def unfit(self, block: VectorBlock) -> dict[int, str]:  # noqa: ARG002
        """Rows that the format cannot store: index and reason."""
        return {}

    def sizes(self) -> dict[str, int]:
        """Sync all files to disk and return their lengths."""
        for file in self.open.values():
            sync(file)
        return {name: file.tell() for name, file in self.open.items()}

    def finish(self, rows: int) -> None:  # noqa: B027 - most formats need none
        """Write what the format stores about all `rows`. Can be repeated."""

    def close(self) -> None:
        """Close all files."""
        for file in self.open.values():
            file.close()


def open_truncated(path: Path, size: int) -> IO[bytes]:
    """The file, truncated to `size` bytes and positioned at its end.

    Raises:
        BadInput: it is a link, or shorter than that.
    """
    file = own_file(path, os.O_RDWR | os.O_CREAT)
    if (length := os.fstat(file.fileno()).st_size) < size:
        file.close()
        raise BadInput(f"{path}: has {length:,} bytes, and the journal says {size:,}; {start_anew(path.parent)}")
    file.truncate(size)
    file.seek(size)
    return file


def lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON object per line."""
    return b"".join(strict_json.dumps(record).encode() + b"\n" for record in records)
