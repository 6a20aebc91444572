"""The files of a run: what each format writes of a window, and how it is made whole at the end.

Every file only grows while the run lasts, so a run that was killed is mended by cutting each at the length that the journal
has. What a format wants to say about the whole (an array's shape, a Parquet file's index) is written last.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qembed.errors import BadInput, MissingExtra
from qembed.files import sync

if TYPE_CHECKING:
    from numpy.typing import NDArray

VECTORS, IDS, REJECTS, INDEX = "vectors", "ids.jsonl", "rejects.jsonl", "index"
NPY_HEAD = 128
"""Bytes before the array: numpy leaves room there for any number of rows."""
CHUNK_COLUMNS = {"start": "int64", "end": "int64", "page": "int32"}


@dataclass(frozen=True)
class Shape:
    """What the vectors are: `width` numbers each, of numpy's type `element`; `columns` go with them, in this order.

    `about` is said of them where the format has a place for it.
    """

    dtype: str
    element: str
    width: int
    columns: Sequence[str]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Block:
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

    def __init__(self, folder: Path, shape: Shape, sizes: Mapping[str, int]) -> None:
        self.folder, self.shape = folder, shape
        self.open = {name: grown(folder / name, sizes.get(name, 0)) for name in self.files}

    @abstractmethod
    def write(self, block: Block) -> None:
        """Append a window."""

    def unfit(self, block: Block) -> dict[int, str]:  # noqa: ARG002
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
    return b"".join(json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n" for record in records)


class Npy(Output):
    """An array [rows, width], to be opened with `numpy.load(OUT, mmap_mode="r")`, and a line for each row in the ids file."""

    files = (VECTORS, IDS)

    def write(self, block: Block) -> None:
        """Append a window."""
        if not self.open[VECTORS].tell():
            self.open[VECTORS].write(bytes(NPY_HEAD))
        self.open[VECTORS].write(block.vectors.tobytes())
        self.open[IDS].write(lines(block.records()))

    def finish(self, rows: int) -> None:
        """Write the header."""
        import numpy as np

        file = self.open[VECTORS]
        file.seek(0)
        descr = np.dtype(self.shape.element).newbyteorder("<").str
        shape = (rows, self.shape.width)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        assert file.tell() == NPY_HEAD
        file.seek(0, os.SEEK_END)


class Fvecs(Output):
    """Each vector as its length (int32) and float32 numbers, little-endian, as FAISS's benches read it; ids as for Npy."""

    files = (VECTORS, IDS)

    def write(self, block: Block) -> None:
        """Append a window."""
        import numpy as np

        rows = np.empty((len(block.vectors), 1 + self.shape.width), "<f4")
        rows[:, 0] = np.array(self.shape.width, "<i4").view("<f4")
        rows[:, 1:] = block.vectors
        self.open[VECTORS].write(rows.tobytes())
        self.open[IDS].write(lines(block.records()))


class Jsonl(Output):
    """One JSON object a line: id, vector, then the other columns."""

    def write(self, block: Block) -> None:
        """Append a window."""
        shown = _shown(self.shape)
        out = []
        for record, vector in zip(block.records(), block.vectors.tolist(), strict=True):
            name = json.dumps(record.pop("id"), ensure_ascii=False)
            rest = json.dumps(record, ensure_ascii=False, default=str)[1:-1]
            out.append(f'{{"id": {name}, "vector": [{shown % tuple(vector)}]{", " if rest else ""}{rest}}}\n')
        self.open[VECTORS].write("".join(out).encode())


class Csv(Output):
    """A header, then id, the vector as "[0.1,0.2]" (which pgvector's COPY takes), and the other columns."""

    def write(self, block: Block) -> None:
        """Append a window."""
        import csv
        import io

        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if not self.open[VECTORS].tell():
            writer.writerow(["id", "vector", *block.columns])
        shown = _shown(self.shape)
        columns = [[_cell(value) for value in column] for column in block.columns.values()]
        for name, vector, *values in zip(block.ids, block.vectors.tolist(), *columns, strict=True):
            writer.writerow([name, f"[{shown % tuple(vector)}]", *values])
        self.open[VECTORS].write(out.getvalue().encode())

    def finish(self, rows: int) -> None:
        """Without any row there is a header still."""
        if not rows:
            file = self.open[VECTORS]
            file.seek(0)
            file.write(",".join(["id", "vector", *self.shape.columns]).encode() + b"\n")


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | bool) else value


def _shown(shape: Shape) -> str:
    """A format for all numbers of a vector, with as many digits as give each back exactly."""
    one = "%d" if shape.element in ("int8", "uint8") else "%.9g" if shape.element == "float32" else "%.5g"
    return ",".join([one] * shape.width)


def kinds() -> dict[str, type[Output]]:
    """The formats by the suffix of OUT."""
    from qembed.embed.parquet import Parquet

    return {".npy": Npy, ".parquet": Parquet, ".csv": Csv, ".jsonl": Jsonl, ".fvecs": Fvecs}


def kind(path: Path, dtype: str) -> type[Output]:
    """What writes `path`, by its name.

    Raises:
        BadInput: its name tells no format, or the format has no such numbers.
        MissingExtra: Parquet, and pyarrow is not installed.
    """
    found = kinds().get(path.suffix.lower())
    if found is None:
        raise BadInput(f"{path}: its name tells no format; call it {', '.join(kinds())}")
    if found is Fvecs and dtype != "float32":
        raise BadInput(f"{path}: .fvecs holds float32; --output-dtype {dtype} goes into {', '.join(kinds())[:-8]}")
    if path.suffix.lower() == ".parquet":
        from importlib.util import find_spec

        if find_spec("pyarrow") is None:
            raise MissingExtra(f"{path}: writing Parquet needs pyarrow; install it: pip install 'qembed[parquet]'")
    return found
