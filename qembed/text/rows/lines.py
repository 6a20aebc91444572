"""Decoded lines of a byte stream: encoding, byte order marks, and lines that are too long."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import IO, Any, cast

from qembed.errors import BadInput
from qembed.text.rows.options import RowOptions
from qembed.text.rows.record import HALF_PAIR

LONGEST_LINE = 64 * 2**20
"""Characters. A longer line is an invalid record: a file without line breaks must not fill the memory."""
UTF8 = "utf-8"
NOT_UTF8 = "not UTF-8"
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, UTF8),
)
"""UTF-32 first: its little-endian mark begins with that of UTF-16."""
INVALID = range(0xDC80, 0xDD00)
"""Surrogates that stand for bytes which the encoding does not have (PEP 383)."""
FILLER = "\udcff"
ERRORS = "qembed-rows"


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    """Decode invalid bytes as surrogates. Unlike "surrogateescape" this works for UTF-16 too."""
    assert isinstance(error, UnicodeDecodeError)
    raw = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) if byte >= 0x80 else FILLER for byte in raw) or FILLER, error.end


codecs.register_error(ERRORS, _mark_invalid)


class Lines:
    """The lines of a binary stream with their ends. Invalid bytes become surrogates, see `problem`.

    `universal`: a carriage return alone ends a line too, as spreadsheets on the Macintosh write it; otherwise only a newline
    does. Without an encoding in `options` it is UTF-8, or what a byte order mark says.

    Attributes:
        encoding: of the stream.
        by_mark: whether a byte order mark of UTF-16 or UTF-32 decided it.
        too_long: whether the last line was longer than LONGEST_LINE; it is returned shortened.
        bytes_read: approximately.
    """

    def __init__(self, name: str, stream: IO[bytes], options: RowOptions, universal: bool = False) -> None:
        encoding = options.encoding
        # A stream without peek() is wrapped; the wrapper must live as long as the stream, which it would close.
        self._buffered: Any = stream if hasattr(stream, "peek") else io.BufferedReader(cast(io.RawIOBase, stream))
        head: bytes = self._buffered.peek(64)[:64]
        marked = next((what for mark, what in BYTE_ORDER_MARKS if head.startswith(mark)), None)
        if encoding is None and marked is None and _looks_like_utf16(head):
            advice = f"; read it with --encoding utf-16-{'be' if head[0] == 0 else 'le'}" if options.adjustable else ""
            raise BadInput(f"{name}: looks like UTF-16 without a byte order mark{advice}")
        if head and marked is None and encoding in ("utf-16", "utf-32"):
            raise BadInput(f"{name}: no byte order mark; say --encoding {encoding}-le (Windows) or {encoding}-be")
        if encoding and marked and not encoding.startswith(marked):
            raise BadInput(f"{name}: {marked.upper()} by its byte order mark; leave --encoding out")
        self.encoding = (encoding or marked or UTF8).removesuffix("-sig")
        self.by_mark = encoding is None and marked not in (None, UTF8)
        self._width = 4 if "32" in self.encoding[:6] else 2 if "utf-16" in self.encoding else 1
        self._text = io.TextIOWrapper(self._buffered, self.encoding, ERRORS, newline="" if universal else "\n")
        self._ends = ("\n", "\r") if universal else ("\n",)
        self._first = True
        other = "cp1252" if self.encoding == UTF8 else UTF8
        self._advice = f"; name the file's encoding with --encoding, such as {other}" if options.adjustable else ""
        self.too_long = False
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(LONGEST_LINE):
            if self._first:
                line = line.removeprefix("\ufeff")
                self._first = False
            self.bytes_read += len(line) * self._width
            self.too_long = len(line) >= LONGEST_LINE and not line.endswith(self._ends)
            rest = line if self.too_long else ""
            while rest and not rest.endswith(self._ends):
                rest = self._text.readline(LONGEST_LINE)
                self.bytes_read += len(rest) * self._width
            yield line

    @property
    def note(self) -> str | None:
        """What the byte order mark decided, to be shown to the user."""
        return f"read as {self.encoding.upper()}, by its byte order mark" if self.by_mark else None

    def close(self) -> None:
        """Leave the stream, without closing it."""
        if not self._buffered.closed:
            self._text.detach()

    def problem(self, text: str, whole: bool = False) -> str | None:
        """Why `text`, the `whole` line or a cell, cannot be used; None if it can."""
        at = None if text.isascii() else _invalid(text)
        if at is None:
            return None
        if ord(text[at]) not in INVALID:
            return HALF_PAIR
        place = ""
        if whole and self.encoding == UTF8:
            place = f" (byte {len(text[:at].encode(errors='surrogateescape')) + 1})"
        return f"not {self.encoding.upper()}{place}{self._advice}"


def decoded(name: str, content: bytes, options: RowOptions) -> tuple[str, str | None, str | None]:
    """The text of a whole file, the reason if it is not valid in its encoding, and a note if a byte order mark decided that.

    Raises:
        BadInput: the encoding contradicts the byte order mark.
    """
    source = Lines(name, io.BytesIO(content), options)
    text = "".join(source)
    return text, source.problem(text, whole=True), source.note


def problem(text: str) -> str | None:
    """Why a text from a format that is always UTF-8 cannot be used; None if it can."""
    at = None if text.isascii() else _invalid(text)
    if at is None:
        return None
    return NOT_UTF8 if ord(text[at]) in INVALID else HALF_PAIR


def _invalid(text: str) -> int | None:
    """The index of the first surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _looks_like_utf16(head: bytes) -> bool:
    even, odd = head[0:8:2], head[1:8:2]
    return len(head) >= 4 and ((not any(odd) and all(even)) or (not any(even) and all(odd)))
