"""Texts to embed: the built-in held-out texts or a file of the user's; prompted, and cut to the model's context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.errors import BadInput
from qembed.files import sha256
from qembed.text.display import counted
from qembed.text.rows.lines import problem
from qembed.text.rows.options import RowOptions
from qembed.text.rows.reader import DEFAULT, FIXED, format_of, opened
from qembed.text.rows.record import Record, shown
from qembed.text.rows.row_ids import RowId, RowIds
from qembed.text.texts import KINDS, Text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

HELDOUT = Path(__file__).parent / "data" / "heldout.jsonl"
FIELDS = ("kind", "language", "instruction")
SHOWN = 3
BATCH = 1024
"""Texts encoded at once: an encoding takes some hundred bytes per token."""


class _Unusable(BadInput):
    """A row has no text that can be embedded, or no id; `qembed embed` rejects such a row."""


@dataclass(frozen=True)
class Data:
    """The texts of a file, and the SHA-256 of its bytes in hexadecimal."""

    path: Path
    sha256: str
    texts: list[Text]


def read(
    path: Path,
    options: RowOptions = DEFAULT,
    text_column: str | None = None,
    id_column: str | None = None,
    on_note: Callable[[str], None] = lambda _: None,
    *,
    leave_out: bool = False,
) -> Data:
    """Read the texts of a file: `.txt` with one text per line, `.jsonl` with one object per line, `.csv`, `.tsv` or `.parquet`.

    A row has a text (column `text` unless `text_column` names another), and optionally `id` (or `_id`, or `id_column`), `kind`,
    `language` and `instruction`; other columns are ignored. Blank lines are skipped. A text without an id is named as
    `qembed embed` names it: by its line, or in tables by its row. `on_note` is called with what the reader decided.

    `leave_out`: rows that are not valid, or have no text, are left out with a note, as `qembed embed` has no vector of them.

    Raises:
        BadInput: the file cannot be read or is empty, lacks a column, a row is not valid, or has no text, or no row is left.
        MissingExtra: Parquet without pyarrow.
    """
    column = text_column or "text"
    format = format_of(path)  # noqa: A001
    if format == "txt" and (text_column or id_column):
        raise BadInput(f"{path}: plain text has no columns; leave {'--text-column' if text_column else '--id-column'} out")
    required = {column: "--text-column", **({id_column: "--id-column"} if id_column else {})}
    columns = {**dict.fromkeys(FIELDS, ""), **required}
    rows: list[Text] = []
    unusable: list[_Unusable] = []
    with opened(path, format, options, columns) as records:
        for name, option in required.items():
            if not records.has(name):
                raise records.missing(name, option)
        ids = RowIds(id_column, records)
        if ids.table_column is not None:
            columns[ids.table_column] = "--id-column"
        for note in records.notes:
            on_note(f"{path}: {note}")
        for record in records.read(columns):
            row_id = ids.of(record)
            if format == "txt" and record.reason is None and not record.values["text"].strip():
                continue
            try:
                rows.append(_text(record, column, row_id))
            except _Unusable as error:
                if not leave_out:
                    raise
                unusable.append(error)
    if not rows:
        raise unusable[0] if unusable else BadInput(f"{path}: holds no texts")
    if unusable:
        places = "; ".join(str(error).removeprefix(f"{path}, ") for error in unusable[:SHOWN])
        more = "; …" if len(unusable) > SHOWN else ""
        on_note(f"{path}: left out: {counted(len(unusable), 'row')} that cannot be embedded: {places}{more}")
    return Data(path, sha256(path), rows)


@dataclass(frozen=True)
class Measured:
    """Model inputs with their lengths in tokens, including appended tokens, and the number of texts that were cut."""

    texts: list[str]
    tokens: list[int]
    cut: int


def cut(texts: Sequence[str], tokenizer: Tokenizer, limit: int | None) -> Measured:
    """Cut each text at the end to at most `limit` tokens; None only measures them.

    The text is cut, not its tokens, so that every server gets the same input, however it treats long texts. `limit` includes
    the tokens that the tokenizer appends. Cutting at a token boundary can change the tokens before it, so this may take
    several rounds.
    """
    inputs: list[str] = []
    tokens: list[int] = []
    cut_texts = 0
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        for text, encoding in zip(batch, tokenizer.encode_batch(batch), strict=True):
            beginning, length = _fitting(text, encoding, tokenizer, limit)
            cut_texts += beginning != text
            inputs.append(beginning)
            tokens.append(length)
    return Measured(inputs, tokens, cut_texts)


def _fitting(text: str, encoding: Encoding, tokenizer: Tokenizer, limit: int | None) -> tuple[str, int]:
    """The text, or its longest beginning within `limit` tokens, and its number of tokens."""
    if limit is None or len(encoding.ids) <= limit:
        return text, len(encoding.ids)
    allowed = limit - sum(encoding.special_tokens_mask)
    beginning = text
    while len(encoding.ids) > limit and beginning:
        ends = [end for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special]
        beginning = beginning[: min(ends[max(allowed, 1) - 1], len(beginning) - 1)]
        encoding = tokenizer.encode(beginning)
    if not beginning.strip():
        raise BadInput(f"the model's context of {limit} tokens leaves no room for a text")
    return beginning, len(encoding.ids)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and the lines that are not blank; only a newline ends a line.

    Raises:
        BadInput: the file cannot be read, or a line is not UTF-8.
    """
    with opened(path, "txt", FIXED) as records:
        for record in records.read({}):
            if record.reason:
                raise BadInput(f"{record.place}: {record.reason}")
            if record.values["text"].strip():
                yield record.number, record.values["text"]


def _text(record: Record, column: str, row_id: RowId) -> Text:
    where, values = record.place, record.values
    if record.reason:
        raise _Unusable(f"{where}: {record.reason}")
    try:
        text = field(values, column, where)
    except BadInput as error:
        raise _Unusable(str(error)) from error
    if text is None:
        advice = "" if column in values else f"; choose one with --text-column: {shown(list(values))}"
        raise _Unusable(f"{where}: no {column} field{advice}")
    if not text.strip():
        raise _Unusable(f"{where}: the text is empty")
    kind = field(values, "kind", where) or "document"
    if kind not in KINDS:
        raise BadInput(f"{where}: kind '{kind}' is none of {', '.join(KINDS)}")
    if row_id.reason:
        raise _Unusable(f"{where}: {row_id.reason}")
    if reason := problem(row_id.text):
        raise _Unusable(f"{where}: {row_id.column} {reason}")
    return Text(
        id=row_id.text,
        text=text,
        kind=kind,
        language=field(values, "language", where) or None,
        instruction=field(values, "instruction", where) or None,
    )


def field(values: Mapping[str, Any], name: str, where: str) -> str | None:
    """The string in the field `name`, or None; `where` is the location for messages.

    Raises:
        BadInput: the value is not a string.
    """
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadInput(f"{where}: {name} is not a string")
    if reason := problem(value):
        raise BadInput(f"{where}: {name} {reason}")
    return value
