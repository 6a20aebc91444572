"""Texts to embed: the built-in held-out texts or a file of the user's; prompted, and cut to the model's context."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.errors import BadInput
from qembed.files import sha256
from qembed.text.texts import KINDS, Text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

HELDOUT = Path(__file__).parent / "data" / "heldout.jsonl"
ENCODED_AT_ONCE = 1024  # an encoding takes some hundred bytes a token


@dataclass(frozen=True)
class Data:
    """The texts of a file, and the SHA-256 of its bytes in hexadecimal."""

    path: Path
    sha256: str
    texts: list[Text]


def read(path: Path) -> Data:
    """The texts of `path`: `.txt` with one text per line, or `.jsonl` with one object per line.

    An object has `text`, and optionally `id`, `kind`, `language` and `instruction` (strings; other keys are ignored). Blank
    lines are skipped. A text without an id is named by its line: "line 12".

    Raises:
        BadInput: the file cannot be read or is empty, or a line is not UTF-8, not such an object, or has no text.
    """
    parse = {".txt": _plain, ".jsonl": _object}.get(path.suffix.lower())
    if parse is None:
        raise BadInput(f"{path}: name it .txt (one text a line) or .jsonl (one JSON object with a text field a line)")
    found = [parse(line, number, f"{path}, line {number}") for number, line in lines(path)]
    if not found:
        raise BadInput(f"{path}: holds no texts")
    return Data(path, sha256(path), found)


@dataclass(frozen=True)
class Measured:
    """Model inputs with their lengths in tokens, including appended tokens, and the number of texts that were cut."""

    texts: list[str]
    tokens: list[int]
    cut: int


def cut(texts: Sequence[str], tokenizer: Tokenizer, limit: int | None) -> Measured:
    """The texts, each cut at the end to at most `limit` tokens; None only measures them.

    The text is cut, not its tokens, so that every server gets the same input, however it treats long texts. `limit` includes
    the tokens that the tokenizer appends. Cutting at a token boundary can change the tokens before it, so this may take
    several rounds.
    """
    kept: list[str] = []
    tokens: list[int] = []
    count = 0
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        some = list(texts[start : start + ENCODED_AT_ONCE])
        for text, encoding in zip(some, tokenizer.encode_batch(some), strict=True):
            shorter, length = _fitting(text, encoding, tokenizer, limit)
            count += shorter != text
            kept.append(shorter)
            tokens.append(length)
    return Measured(kept, tokens, count)


def _fitting(text: str, encoding: Encoding, tokenizer: Tokenizer, limit: int | None) -> tuple[str, int]:
    """The text, or its longest beginning within `limit` tokens, and its number of tokens."""
    if limit is None or len(encoding.ids) <= limit:
        return text, len(encoding.ids)
    allowed = limit - sum(encoding.special_tokens_mask)
    shorter = text
    while len(encoding.ids) > limit and shorter:
        ends = [end for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special]
        shorter = shorter[: min(ends[max(allowed, 1) - 1], len(shorter) - 1)]
        encoding = tokenizer.encode(shorter)
    if not shorter.strip():
        raise BadInput(f"the model's context of {limit} tokens leaves no room for a text")
    return shorter, len(encoding.ids)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and the lines that are not blank; only a newline ends a line.

    Raises:
        BadInput: the file cannot be read, or a line is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise BadInput(f"{path}, line {number}: not UTF-8 (byte {error.start + 1})") from error
                if line.strip():
                    yield number, line
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error


def _plain(line: str, number: int, where: str) -> Text:  # noqa: ARG001
    return Text(id=f"line {number}", text=line)


def _object(line: str, number: int, where: str) -> Text:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise BadInput(f"{where}: not JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise BadInput(f"{where}: not a JSON object")
    text = field(value, "text", where)
    if text is None:
        raise BadInput(f"{where}: no text field")
    if not text.strip():
        raise BadInput(f"{where}: the text is empty")
    kind = field(value, "kind", where) or "document"
    if kind not in KINDS:
        raise BadInput(f"{where}: kind '{kind}' is none of {', '.join(KINDS)}")
    return Text(
        id=field(value, "id", where) or f"line {number}",
        text=text,
        kind=kind,
        language=field(value, "language", where),
        instruction=field(value, "instruction", where),
    )


def field(value: dict[str, Any], name: str, where: str) -> str | None:
    """The string in the field `name` of an object, or None; `where` is the location for messages.

    Raises:
        BadInput: the value is not a string.
    """
    field = value.get(name)
    if name == "id" and isinstance(field, int) and not isinstance(field, bool):
        field = str(field)
    if field is None:
        return None
    if not isinstance(field, str):
        raise BadInput(f"{where}: {name} is not a string")
    try:
        field.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: {name} holds half of a surrogate pair, which is not text") from error
    return field
