"""Reads rows one at a time from files of any size. An invalid row is returned with a reason; it is not an error."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from qembed.embed.inputs import STDIN, File, Inputs
from qembed.embed.rows import Row
from qembed.errors import BadInput, MissingExtra
from qembed.installation import how_to_install
from qembed.text import tables

LONGEST_LINE = 64 * 2**20
"""Bytes. A longer line is one row that is refused: a file without line breaks must not fill the memory."""
LOOKED_AT = 1000
"""Lines of JSON of which one at least must have a field that is asked for: not each need have it, but it may be misspelt."""
NOT_UTF8 = "not UTF-8"
SURROGATES = range(0xDC80, 0xDD00)
"""What Python's decoder makes of a byte that is not UTF-8 (PEP 383)."""


@dataclass
class Reading:
    """Options and progress of reading: column names (None: "text", and "id" if it exists).

    Attributes:
        keep: columns whose values are kept.
        done: bytes read so far, approximately.
    """

    inputs: Inputs
    text_column: str | None = None
    id_column: str | None = None
    keep: Sequence[str] = ()
    done: int = 0
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(file.size for file in self.inputs.files)

    @property
    def text(self) -> str:
        """The name of the text column."""
        return self.text_column or "text"

    @property
    def kept(self) -> list[str]:
        """The columns to read and keep; `text` is always available and need not be a column."""
        return [name for name in self.keep if name != "text" or self.text == "text"]

    def rows(self) -> Iterator[Row]:
        """All rows of all files in order.

        Raises:
            BadInput: a file cannot be read, or lacks a column.
            MissingExtra: Parquet without pyarrow.
        """
        readers: dict[str, Callable[[File, Reading], Iterator[Row]]] = {
            "txt": _plain,
            "jsonl": _jsonl,
            "csv": _csv,
            "tsv": _csv,
            "parquet": _parquet,
            "document": _document,
        }
        before = 0
        for file in self.inputs.files:
            try:
                yield from readers[file.format](file, self)
            except OSError as error:
                raise BadInput(f"{file.name}: cannot be read: {error.strerror or error}") from error
            before += file.size
            self.done = before

    def id_of(self, file: File, number: int | None) -> str:
        """The id of a row without one of its own."""
        if not self.inputs.folder:
            return file.name if number is None else str(number)
        return file.name if number is None else f"{file.name}:{number}"

    def known(self, file: File, columns: Sequence[str]) -> None:
        """Check that a table has the requested columns."""
        for option, name in (
            ("--text-column", self.text),
            ("--id-column", self.id_column),
            *(("--keep", k) for k in self.kept),
        ):
            if name is not None and name not in columns:
                raise BadInput(f"{file.name}: no column {name!r}; choose with {option}: {', '.join(columns) or 'it has none'}")

    def row(self, file: File, number: int, place: str, values: Mapping[str, Any]) -> Row:
        """The row with these `values` by column."""
        own = values.get(self.id_column or "id")
        columns = {name: values.get(name) for name in self.kept}
        name = self.id_of(file, number)
        if isinstance(own, bool | float | list | dict) or (own is None and self.id_column):
            return Row(place, name, reason=f"{self.id_column or 'id'} is {'missing' if own is None else 'no id'}")
        name = name if own is None else str(own)
        text = values.get(self.text)
        if text is None or not isinstance(text, str):
            missing = "is missing" if text is None else "is not a text"
            return Row(place, name, reason=f"{self.text} {missing}", columns=columns)
        if bad := _not_text([name, text, *(value for value in columns.values() if isinstance(value, str))]):
            return Row(place, _safe(name), _safe(text), bad)
        return Row(place, name, text, columns=columns)


def _not_text(texts: Sequence[str]) -> str | None:
    for text in texts:
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return NOT_UTF8 if ord(text[error.start]) in SURROGATES else "holds half of a surrogate pair, which is no character"
    return None


def _safe(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _open(file: File) -> IO[bytes]:
    return sys.stdin.buffer if file.name == STDIN else file.path.open("rb")


def _lines(file: File, reading: Reading) -> Iterator[tuple[int, str, str | None]]:
    """Line numbers from 1, lines without their ends, and the reason if a line is invalid. Only a newline ends a line."""
    before = reading.done
    stream = _open(file)
    try:
        number = 0
        while raw := stream.readline(LONGEST_LINE):
            number += 1
            before += len(raw)
            too_long = len(raw) == LONGEST_LINE and not raw.endswith(b"\n")
            rest = raw if too_long else b""
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(LONGEST_LINE)
                before += len(rest)
            reading.done = before
            if too_long:
                yield number, "", f"longer than {LONGEST_LINE >> 20} MiB"
                continue
            raw = _begun(file, raw) if number == 1 else raw
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            try:
                yield number, raw.decode(), None
            except UnicodeDecodeError as error:
                yield number, raw.decode(errors="replace"), f"{NOT_UTF8} (byte {error.start + 1})"
    finally:
        if file.name != STDIN:
            stream.close()


def _begun(file: File, raw: bytes) -> bytes:
    """The first line without a UTF-8 byte order mark. UTF-16 is refused: split at newlines, some of its lines would pass as
    text.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInput(f"{file.name}: UTF-16, and texts are read as UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    return raw.removeprefix(codecs.BOM_UTF8)


def _plain(file: File, reading: Reading) -> Iterator[Row]:
    """One text per line. A blank line is a row without text, so that no line is dropped silently."""
    for option, given in (("--text-column", reading.text_column), ("--id-column", reading.id_column)):
        if given:
            raise BadInput(f"{file.name}: plain text has no columns; leave {option} out")
    if reading.kept and (names := [name for name in reading.kept if name != "text"]):
        raise BadInput(f"{file.name}: plain text has no column {names[0]!r} to keep")
    for number, line, wrong in _lines(file, reading):
        columns = {"text": line} if reading.kept else {}
        yield Row(f"{file.name}, line {number}", reading.id_of(file, number), line, wrong, columns)


def _jsonl(file: File, reading: Reading) -> Iterator[Row]:
    first = True
    seen: set[str] = set()
    number = 0
    for number, line, wrong in _lines(file, reading):
        if number == LOOKED_AT and seen:
            reading.known(file, sorted(seen))
        if not line.strip() and wrong is None:
            continue
        place, name = f"{file.name}, line {number}", reading.id_of(file, number)
        if wrong:
            yield Row(place, name, line or None, wrong)
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(place, name, line, f"not JSON: {error}"[:300])
            continue
        if not isinstance(value, dict):
            yield Row(place, name, line, "not a JSON object")
            continue
        if first:
            first = False
            if reading.text not in value:
                reading.known(file, list(value))
        if number < LOOKED_AT:
            seen.update(value)
        yield reading.row(file, number, place, value)
    if number < LOOKED_AT and seen:
        reading.known(file, sorted(seen))


def _csv(file: File, reading: Reading) -> Iterator[Row]:
    # A cell may hold line breaks, and an open quotation mark the rest of the file.
    lines = _decoded(file, reading)
    reader = tables.reader(lines, f".{file.format}")
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise BadInput(f"{file.name}, line 1: not CSV: {error}") from error
    reading.known(file, header)
    number = 0
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield Row(f"{file.name}, line {begin}", reading.id_of(file, number), reason=f"not CSV: {error}")
            continue
        if not cells:
            continue
        number += 1
        place = f"{file.name}, line {begin}"
        if len(cells) != len(header):
            name = reading.id_of(file, number)
            yield Row(place, name, _safe(",".join(cells)), f"{len(cells)} cells, the header has {len(header)}")
            continue
        values: dict[str, Any] = dict(zip(header, cells, strict=True))
        if values.get("id") == "" and reading.id_column is None:
            del values["id"]
        yield reading.row(file, number, place, values)


def _decoded(file: File, reading: Reading) -> Iterator[str]:
    """Lines with their ends; bytes that are not UTF-8 become surrogates, for which the row is rejected later."""
    stream = _open(file)
    try:
        first = True
        while raw := stream.readline(LONGEST_LINE):
            reading.done += len(raw)
            yield (_begun(file, raw) if first else raw).decode(errors="surrogateescape")
            first = False
    finally:
        if file.name != STDIN:
            stream.close()


def _parquet(file: File, reading: Reading) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{file.name}: reading Parquet needs pyarrow; install it: {how_to_install('parquet')}") from error
    before, number = reading.done, 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            reading.known(file, names)
            wanted = [name for name in dict.fromkeys((reading.text, reading.id_column or "id", *reading.kept)) if name in names]
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                reading.done = before + file.size * number // max(table.metadata.num_rows, 1)
                for values in _values(batch):
                    number += 1
                    place = f"{file.name}, row {number}"
                    if values is None:
                        yield Row(place, reading.id_of(file, number), reason=NOT_UTF8)
                    else:
                        yield reading.row(file, number, place, values)
    except pyarrow.ArrowException as error:
        raise BadInput(f"{file.name}: not Parquet, or damaged: {' '.join(str(error).split())[:200]}") from error


def _values(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of an Arrow batch; None for a row with a string that is not UTF-8, which Parquet does not check."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


def _document(file: File, reading: Reading) -> Iterator[Row]:
    stream = _open(file)
    try:
        content = stream.read()
    finally:
        if file.name != STDIN:
            stream.close()
    kind = file.path.suffix.lower() if file.name != STDIN else ".txt"
    columns = dict.fromkeys(reading.kept)
    yield Row(file.name, file.name, columns=columns, document=content, kind=kind)
