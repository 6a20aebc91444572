"""Calibration texts: those that ship with qembed, or the user's own file, read line by line and sampled by seed."""

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
from qembed.text import tables
from qembed.text.texts import KINDS, Text

BUILT_IN = Path(__file__).parent / "data" / "calibration.jsonl"
SOURCE = "built-in"
COLUMN = "text"
COUNT = 288
"""As many as ship with qembed."""
LEAST = 64
"""Fewer would say little, to calibrate on or to measure with."""


def kept_apart(count: int) -> int:
    """How many of `count` texts are kept apart to measure fidelity on: one in nine, but 10 at least and 32 at most."""
    return min(32, max(10, count // 9))


@dataclass(frozen=True)
class Texts:
    """Texts, what the user would call where they came from, and the SHA-256 of that file."""

    texts: list[Text]
    source: str
    sha256: str


def built_in(count: int = COUNT, seed: int = 0) -> Texts:
    """`count` of the texts that ship with qembed (17 languages, code, queries with instructions), drawn by `seed`."""
    return Texts(_draw(_rows(BUILT_IN, None), count, seed), SOURCE, sha256(BUILT_IN))


def read(argument: str, count: int, seed: int) -> Texts:
    """`count` texts (all, if there are fewer) of the file that `argument` names as FILE or FILE:COLUMN, drawn by `seed`.

    The file may be of any size: it is read row by row. Its name tells its format: `.txt` has one text a line, `.jsonl` one
    object, `.csv` and `.tsv` a header and rows, `.parquet` a table. COLUMN (or field) is `text` unless named; `kind` and
    `instruction`, where they exist, say which texts are queries and for what task.

    Raises:
        BadInput: it cannot be read, is not UTF-8, has too few texts, or a row is not as it should be (named by its line).
        MissingExtra: Parquet, and pyarrow is not installed.
    """
    path, column = _split(argument)
    try:
        chosen = _draw(_rows(path, column), count, seed)
        digest = sha256(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(chosen) < LEAST:
        raise BadInput(
            f"{path}: {len(chosen) or 'no'} texts, at least {LEAST} are needed: half to calibrate, half to measure on"
        )
    return Texts(chosen, path.name, digest)


def _split(argument: str) -> tuple[Path, str | None]:
    """The file and the column in FILE or FILE:COLUMN. A file that is called that, colon and all, is the file."""
    path = Path(argument).expanduser()
    if not path.exists() and ":" in argument:
        name, _, column = argument.rpartition(":")
        path = Path(name).expanduser()
        if path.exists() and column:
            return _file(path), column
    return _file(path), None


def _file(path: Path) -> Path:
    if not path.exists():
        raise BadInput(f"{path}: no such file; --calibration takes FILE or FILE:COLUMN")
    if not path.is_file():
        raise BadInput(f"{path}: not a file; --calibration takes FILE or FILE:COLUMN")
    return path


def _draw(rows: Iterable[Text], count: int, seed: int) -> list[Text]:
    """`count` of `rows` in their order, each with the same chance (reservoir sampling, Vitter 1985, algorithm R)."""
    draw = random.Random(seed)
    kept: list[tuple[int, Text]] = []
    for number, row in enumerate(rows):
        if number < count:
            kept.append((number, row))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def _rows(path: Path, column: str | None) -> Iterator[Text]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        if column:
            raise BadInput(f"{path}: plain text has no columns; leave ':{column}' out")
        return (Text(f"{path}, line {number}", line.strip()) for number, line in _lines(path) if line.strip())
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl(path, column or COLUMN)
    if suffix in (".csv", ".tsv"):
        return _csv(path, column or COLUMN, suffix)
    if suffix in (".parquet", ".pq"):
        return _parquet(path, column or COLUMN)
    raise BadInput(f"{path}: its name tells no format; call it .txt, .jsonl, .csv, .tsv or .parquet")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and the lines with their ends; only a newline ends a line, whatever Unicode says."""
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
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{place}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BadInput(f"{place}: not a JSON object")
        yield _text(value, column, place)


def _csv(path: Path, column: str, suffix: str) -> Iterator[Text]:
    reader = tables.reader((line for _, line in _lines(path)), suffix)
    try:
        header: list[str] = next(reader, [])
        _has(header, column, path)
        for cells in reader:
            if not cells:
                continue
            place = f"{path}, line {reader.line_num}"
            if len(cells) > len(header):
                raise BadInput(f"{place}: more columns than the header has")
            yield _text({name: cell or None for name, cell in zip_longest(header, cells)}, column, place)
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _parquet(path: Path, column: str) -> Iterator[Text]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{path}: reading Parquet needs pyarrow; install it: pip install 'qembed[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _has(file.schema_arrow.names, column, path)
            wanted = [name for name in dict.fromkeys((column, "kind", "instruction")) if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield _text(row, column, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise BadInput(f"{path}: not Parquet, or damaged: {' '.join(str(error).split())}") from error


def _has(columns: Iterable[str], column: str, path: Path) -> None:
    if column not in columns:
        raise BadInput(
            f"{path}: no column {column!r}; choose one with {path.name}:COLUMN: {', '.join(columns) or 'it has none'}"
        )


def _text(row: Mapping[str, Any], column: str, place: str) -> Text:
    if column not in row:
        raise BadInput(f"{place}: no field {column!r}; choose one with FILE:FIELD")
    text, kind, instruction = (_string(row, name, place) for name in (column, "kind", "instruction"))
    if text is None or not text.strip():
        raise BadInput(f"{place}: the text is empty")
    if kind is not None and kind not in KINDS:
        raise BadInput(f"{place}: kind {kind!r} is none of {', '.join(KINDS)}")
    return Text(place, text, kind or "document", instruction=instruction)


def _string(row: Mapping[str, Any], name: str, place: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadInput(f"{place}: {name} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{place}: {name} holds half of a surrogate pair, which is no text") from error
    return value
