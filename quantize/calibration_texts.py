"""Reads calibration texts: the built-in ones, or a random sample of the user's file, which is streamed row by row."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qembed.errors import BadInput, MissingExtra
from qembed.files import sha256
from qembed.installation import how_to_install
from qembed.text import tables
from qembed.text.texts import KINDS, Text

BUILT_IN = Path(__file__).parent / "data" / "calibration.jsonl"
SOURCE = "built-in"
DEFAULT_COLUMN = "text"
BUILT_IN_COUNT = 288
"""Number of texts that ship with qembed."""
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


def built_in(count: int = BUILT_IN_COUNT, seed: int = 0) -> Texts:
    """Draw `count` of the texts that ship with qembed (17 languages, code, queries with instructions), by `seed`."""
    return Texts(_sample(_rows(BUILT_IN, None), count, seed), SOURCE, sha256(BUILT_IN))


def read(argument: str, count: int, seed: int) -> Texts:
    """Draw `count` texts (all, if there are fewer) by `seed` from the file that `argument` names as FILE or FILE:COLUMN.

    The file is read row by row, so it can be of any size. Its suffix selects the format: `.txt` with one text per line,
    `.jsonl` with one object per line, `.csv` and `.tsv` with a header, or `.parquet`. COLUMN (or field) defaults to `text`.
    The optional columns `kind` and `instruction` mark queries and name their task.

    Raises:
        BadInput: the file cannot be read, is not UTF-8, has too few texts, or has an invalid row (the message names its line).
        MissingExtra: the file is Parquet, and pyarrow is not installed.
    """
    path, column = _split(argument)
    try:
        texts = _sample(_rows(path, column), count, seed)
        digest = sha256(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(texts) < MIN_TEXTS:
        raise BadInput(f"{path}: {len(texts) or 'no'} texts, at least {MIN_TEXTS} are needed to calibrate and to measure on")
    return Texts(texts, path.name, digest)


def _split(argument: str) -> tuple[Path, str | None]:
    """Split FILE or FILE:COLUMN into file and column. If a file of the whole name exists, colon included, it is the file."""
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


def _sample(rows: Iterable[Text], count: int, seed: int) -> list[Text]:
    """A uniform sample of `count` of `rows`, in their order (reservoir sampling, Vitter 1985, algorithm R)."""
    generator = random.Random(seed)
    reservoir: list[tuple[int, Text]] = []
    for number, row in enumerate(rows):
        if number < count:
            reservoir.append((number, row))
        elif (slot := generator.randrange(number + 1)) < count:
            reservoir[slot] = (number, row)
    return [row for _, row in sorted(reservoir, key=lambda pair: pair[0])]


def _rows(path: Path, column: str | None) -> Iterator[Text]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        if column:
            raise BadInput(f"{path}: plain text has no columns; leave ':{column}' out")
        return (Text(f"{path}, line {number}", line.strip()) for number, line in _lines(path) if line.strip())
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl(path, column or DEFAULT_COLUMN)
    if suffix in (".csv", ".tsv"):
        return _csv(path, column or DEFAULT_COLUMN, suffix)
    if suffix in (".parquet", ".pq"):
        return _parquet(path, column or DEFAULT_COLUMN)
    raise BadInput(f"{path}: unknown format; supported suffixes are .txt, .jsonl, .csv, .tsv and .parquet")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and lines with their ends. Only a newline ends a line, not Unicode's other line breaks."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}, line {number}: not UTF-8 (byte {error.start + 1})") from error


def _jsonl(path: Path, column: str) -> Iterator[Text]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{location}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BadInput(f"{location}: not a JSON object")
        yield _text(value, column, location)


def _csv(path: Path, column: str, suffix: str) -> Iterator[Text]:
    reader = tables.reader((line for _, line in _lines(path)), suffix)
    try:
        header: list[str] = next(reader, [])
        _require_column(header, column, path)
        for cells in reader:
            if not cells:
                continue
            location = f"{path}, line {reader.line_num}"
            if len(cells) > len(header):
                raise BadInput(f"{location}: more columns than the header has")
            yield _text({name: cell or None for name, cell in zip_longest(header, cells)}, column, location)
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _parquet(path: Path, column: str) -> Iterator[Text]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{path}: reading Parquet needs pyarrow; install it: {how_to_install('parquet')}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_column(file.schema_arrow.names, column, path)
            columns = [name for name in dict.fromkeys((column, "kind", "instruction")) if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _text(row, column, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise BadInput(f"{path}: not Parquet, or damaged: {' '.join(str(error).split())}") from error


def _require_column(columns: Iterable[str], column: str, path: Path) -> None:
    if column not in columns:
        raise BadInput(
            f"{path}: no column {column!r}; choose one with {path.name}:COLUMN: {', '.join(columns) or 'it has none'}"
        )


def _text(row: Mapping[str, Any], column: str, location: str) -> Text:
    if column not in row:
        raise BadInput(f"{location}: no field {column!r}; choose one with FILE:FIELD")
    text, kind, instruction = (_string(row, name, location) for name in (column, "kind", "instruction"))
    if text is None or not text.strip():
        raise BadInput(f"{location}: the text is empty")
    if kind is not None and kind not in KINDS:
        raise BadInput(f"{location}: kind {kind!r} is unknown; kinds are {', '.join(KINDS)}")
    return Text(location, text, kind or "document", instruction=instruction)


def _string(row: Mapping[str, Any], name: str, location: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadInput(f"{location}: {name} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{location}: {name} contains half of a surrogate pair, which is not a character") from error
    return value
