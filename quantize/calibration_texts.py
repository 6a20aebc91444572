"""Reads calibration texts: the built-in ones, or a random sample of the user's file, which is streamed row by row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qembed.errors import BadInput
from qembed.files import sha256
from qembed.text.rows.lines import problem
from qembed.text.rows.options import RowOptions
from qembed.text.rows.reader import DEFAULT, format_of, opened
from qembed.text.rows.record import Record, shown
from qembed.text.texts import KINDS, Text

BUILT_IN = Path(__file__).parent / "data" / "calibration.jsonl"
SOURCE = "built-in"
DEFAULT_COLUMN = "text"
DEFAULT_COUNT = 450
"""Number of texts that are drawn by default. 1,265 ship with qembed: time grows with the number, and error falls slowly."""
Row = TypeVar("Row")
MIN_TEXTS = 64
"""Fewer texts are too few to calibrate on and to measure fidelity with."""


def held_out_count(count: int) -> int:
    """How many of `count` texts are held out to measure fidelity: one in nine, but at least 10 and at most 32."""
    return min(32, max(10, count // 9))


@dataclass(frozen=True)
class Texts:
    """Texts, the name of their source ("built-in", or a file name), and the SHA-256 of their file."""

    texts: list[Text]
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)


def built_in(count: int = DEFAULT_COUNT, seed: int = 0) -> Texts:
    """Draw `count` of the texts that ship with qembed (31 languages, code, prompts, dialogues, queries), by `seed`."""
    return Texts(sample(_rows(BUILT_IN, None, DEFAULT), count, seed), SOURCE, sha256(BUILT_IN))


def read(
    argument: str,
    count: int,
    seed: int,
    options: RowOptions = DEFAULT,
    on_note: Callable[[str], None] = lambda _: None,
) -> Texts:
    """Draw `count` texts (all, if there are fewer) by `seed` from the file that `argument` names as FILE or FILE:COLUMN.

    The file is read row by row, so it can be of any size. Its suffix selects the format: `.txt` with one text per line,
    `.jsonl` with one object per line, `.csv` and `.tsv` with a header, or `.parquet`. COLUMN (or field) defaults to `text`.
    The optional columns `kind` and `instruction` mark queries and name their task. `on_note` is called with what the reader
    decided, such as a delimiter.

    Raises:
        BadInput: the file cannot be read, has too few texts, or has an invalid row (the message names its line).
        MissingExtra: the file is Parquet, and pyarrow is not installed.
    """
    path, column = file_and_column(argument)
    texts, digest = drawn(path, _rows(path, column, options, on_note), count, seed, "texts")
    return Texts(texts, path.name, digest)


def drawn(path: Path, rows: Iterable[Row], count: int, seed: int, unit: str) -> tuple[list[Row], str]:
    """`count` of the `rows` of the file at `path`, drawn by `seed`, and the file's SHA-256; `unit` names them in messages.

    Raises:
        BadInput: the file cannot be read, or has fewer than MIN_TEXTS rows.
    """
    try:
        chosen, digest = sample(rows, count, seed), sha256(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(chosen) < MIN_TEXTS:
        raise BadInput(f"{path}: {len(chosen) or 'no'} {unit}, at least {MIN_TEXTS} are needed to calibrate and to measure on")
    return chosen, digest


def file_and_column(argument: str) -> tuple[Path, str | None]:
    """Split FILE or FILE:COLUMN into file and column. If a file of the whole name exists, colon included, it is the file.

    Raises:
        BadInput: there is no such file.
    """
    path = Path(argument).expanduser()
    if not path.exists() and ":" in argument:
        name, _, column = argument.rpartition(":")
        path = Path(name).expanduser()
        if path.exists() and column:
            return _checked_file(path), column
    return _checked_file(path), None


def _checked_file(path: Path) -> Path:
    if not path.exists():
        raise BadInput(f"{path}: no such file; --calibration takes FILE or FILE:COLUMN")
    if not path.is_file():
        raise BadInput(f"{path}: not a file; --calibration takes FILE or FILE:COLUMN")
    return path


def sample(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """A uniform sample of `count` of `rows`, in their order (reservoir sampling, Vitter 1985, algorithm R)."""
    generator = random.Random(seed)
    reservoir: list[tuple[int, Row]] = []
    for number, row in enumerate(rows):
        if number < count:
            reservoir.append((number, row))
        elif (slot := generator.randrange(number + 1)) < count:
            reservoir[slot] = (number, row)
    return [row for _, row in sorted(reservoir, key=lambda pair: pair[0])]


def _rows(
    path: Path, column: str | None, options: RowOptions, on_note: Callable[[str], None] = lambda _: None
) -> Iterator[Text]:
    format = format_of(path)  # noqa: A001
    options.check({format})
    if format == "txt" and column:
        raise BadInput(f"{path}: plain text has no columns; leave ':{column}' out")
    column = column or DEFAULT_COLUMN
    wanted = {"kind": "", "instruction": "", column: f"{path.name}:COLUMN"}
    for record in valid_records(path, format, options, wanted, [column], on_note):
        if format != "txt":
            yield _text(record.values, column, record.place)
        elif line := record.values["text"].strip():
            yield Text(record.place, line)


def valid_records(
    path: Path,
    format: str,  # noqa: A002
    options: RowOptions,
    wanted: Mapping[str, str],
    required: Iterable[str],
    on_note: Callable[[str], None],
) -> Iterator[Record]:
    """The records of a file with the columns `wanted` (see `reader.opened`), of which it must have those `required`.

    Raises:
        BadInput: a column is missing, or a row is invalid.
    """
    with opened(path, format, options, wanted) as records:
        for column in required:
            if not records.has(column):
                raise records.missing(column, wanted[column])
        for note in records.notes:
            on_note(f"{path}: {note}")
        for record in records.read(wanted):
            if record.reason:
                raise BadInput(f"{record.place}: {record.reason}")
            yield record


def _text(row: Mapping[str, Any], column: str, location: str) -> Text:
    if column not in row:
        raise BadInput(f"{location}: no field {column!r}; choose one with FILE:FIELD: {shown(list(row))}")
    text, kind, instruction = (string_of(row, name, location) for name in (column, "kind", "instruction"))
    if text is None or not text.strip():
        raise BadInput(f"{location}: the text is empty")
    if kind and kind not in KINDS:
        raise BadInput(f"{location}: kind {kind!r} is unknown; kinds are {', '.join(KINDS)}")
    return Text(location, text, kind or "document", instruction=instruction or None)


def string_of(row: Mapping[str, Any], name: str, location: str) -> str | None:
    """The string `name` of `row`, which is at `location` of a file; None if it has none.

    Raises:
        BadInput: it is no string, or has something that no text may have.
    """
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadInput(f"{location}: {name} is not a string")
    if reason := problem(value):
        raise BadInput(f"{location}: {name} {reason}")
    return value
