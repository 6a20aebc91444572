"""The output formats by suffix of OUT: how each writes a window, and what it writes at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qembed.embed.outputs import IDS, VECTORS, Output, VectorBlock, VectorLayout, lines
from qembed.embed.parquet import Parquet
from qembed.errors import BadInput, MissingExtra
from qembed.installation import how_to_install
from qembed.text import strict_json

NPY_HEAD = 128
"""Bytes before the array: numpy leaves room there for any number of rows."""


class Npy(Output):
    """An array [rows, width] for `numpy.load(OUT, mmap_mode="r")`, and a line per row in the ids file."""

    files = (VECTORS, IDS)

    def write(self, block: VectorBlock) -> None:
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
    """Each vector as its length (int32) and float32 numbers, little-endian, the format of FAISS benchmarks; ids as for Npy."""

    files = (VECTORS, IDS)

    def write(self, block: VectorBlock) -> None:
        """Append a window."""
        import numpy as np

        rows = np.empty((len(block.vectors), 1 + self.shape.width), "<f4")
        rows[:, 0] = np.array(self.shape.width, "<i4").view("<f4")
        rows[:, 1:] = block.vectors
        self.open[VECTORS].write(rows.tobytes())
        self.open[IDS].write(lines(block.records()))


class Jsonl(Output):
    """One JSON object per line: id, vector, then the other columns."""

    def write(self, block: VectorBlock) -> None:
        """Append a window."""
        numbers = _number_format(self.shape)
        rows = []
        for record, vector in zip(block.records(), block.vectors.tolist(), strict=True):
            name = strict_json.dumps(record.pop("id"))
            rest = strict_json.dumps(record)[1:-1]
            rows.append(f'{{"id": {name}, "vector": [{numbers % tuple(vector)}]{", " if rest else ""}{rest}}}\n')
        self.open[VECTORS].write("".join(rows).encode())


class Csv(Output):
    """A header, then id, the vector as "[0.1,0.2]" (which pgvector's COPY accepts), and the other columns."""

    def write(self, block: VectorBlock) -> None:
        """Append a window."""
        import csv
        import io

        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if not self.open[VECTORS].tell():
            writer.writerow(["id", "vector", *block.columns])
        numbers = _number_format(self.shape)
        columns = [[_cell(value) for value in column] for column in block.columns.values()]
        for name, vector, *values in zip(block.ids, block.vectors.tolist(), *columns, strict=True):
            writer.writerow([name, f"[{numbers % tuple(vector)}]", *values])
        self.open[VECTORS].write(out.getvalue().encode())

    def finish(self, rows: int) -> None:
        """Without rows, write at least the header."""
        if not rows:
            file = self.open[VECTORS]
            file.seek(0)
            file.write(",".join(["id", "vector", *self.shape.columns]).encode() + b"\n")


def _cell(value: Any) -> Any:
    return strict_json.dumps(value) if isinstance(value, dict | list | bool) else value


def _number_format(shape: VectorLayout) -> str:
    """A format string for the numbers of a vector, with enough digits to restore each exactly."""
    number = "%d" if shape.element in ("int8", "uint8") else "%.9g" if shape.element == "float32" else "%.5g"
    return ",".join([number] * shape.width)


def kinds() -> dict[str, type[Output]]:
    """The formats by suffix of OUT."""
    return {".npy": Npy, ".parquet": Parquet, ".csv": Csv, ".jsonl": Jsonl, ".fvecs": Fvecs}


def kind(path: Path, dtype: str) -> type[Output]:
    """The format of `path`, by its suffix.

    Raises:
        BadInput: unknown suffix, or the format cannot hold `dtype`.
        MissingExtra: Parquet without pyarrow.
    """
    output_type = kinds().get(path.suffix.lower())
    if output_type is None:
        raise BadInput(f"{path}: unknown suffix; supported are {', '.join(kinds())}")
    if output_type is Fvecs and dtype != "float32":
        raise BadInput(f"{path}: .fvecs holds float32 only; for --output-dtype {dtype} use {', '.join(kinds())[:-8]}")
    if path.suffix.lower() == ".parquet":
        from importlib.util import find_spec

        if find_spec("pyarrow") is None:
            raise MissingExtra(f"{path}: writing Parquet needs pyarrow; install it: {how_to_install('parquet')}")
    return output_type
