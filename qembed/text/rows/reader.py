"""Opens a file of any supported format as records."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qembed.errors import BadInput
from qembed.parquet import file as parquet
from qembed.text.rows.jsonl import JsonRecords
from qembed.text.rows.options import RowOptions
from qembed.text.rows.parquet import ParquetRecords
from qembed.text.rows.plain import PlainRecords
from qembed.text.rows.record import Records
from qembed.text.rows.tables import TableRecords

FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Formats by the suffix of a file's name."""
DEFAULT = RowOptions()
FIXED = RowOptions(adjustable=False)
"""For files that have one form, such as those of public data sets."""


def format_of(path: Path) -> str:
    """The format of a file, by its name.

    Raises:
        BadInput: the name tells none.
    """
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"{path}: unknown format; call it {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


@contextmanager
def opened(
    path: Path,
    format: str | None = None,  # noqa: A002
    options: RowOptions = DEFAULT,
    wanted: Collection[str] = (),
    name: str | None = None,
    stream: IO[bytes] | None = None,
) -> Iterator[Records]:
    """The records of a file; they can be read once.

    `format` is one of FORMATS' values (None: by the name); `name` is the file's name in messages; `stream` is read in place of
    the file (not Parquet). `wanted`: columns of which a table probably has some, to decide its delimiter.

    Raises:
        BadInput: the file cannot be read, or is damaged.
        MissingExtra: Parquet without pyarrow.
    """
    name, format = name or str(path), format or format_of(path)  # noqa: A001
    own = None
    try:
        if format == "parquet":
            with parquet.opened(path, name, texts_as_dictionary=True) as file:
                yield ParquetRecords(file, path.stat().st_size)
            return
        source = stream
        if source is None:
            source = own = path.open("rb")
        if format == "txt":
            yield PlainRecords(name, source, options)
        elif format == "jsonl":
            yield JsonRecords(name, source, options)
        else:
            yield TableRecords(name, source, format, options, wanted)
    except OSError as error:
        raise BadInput(f"{name}: cannot be read: {error.strerror or error}") from error
    finally:
        if own is not None:
            own.close()
