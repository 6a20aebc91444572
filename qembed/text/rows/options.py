"""How the user says that a file is to be read."""

from __future__ import annotations

import codecs
from collections.abc import Collection
from dataclasses import dataclass

from qembed.errors import BadInput

NAMED_DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
TABLES = ("csv", "tsv")
BINARY = {"parquet", "binary"}


@dataclass(frozen=True)
class RowOptions:
    """Delimiter and encoding (None: decided by the file), and whether the first line of a table is its header.

    `adjustable`: the command has options for them, so messages can advise these.
    """

    delimiter: str | None = None
    encoding: str | None = None
    header: bool = True
    adjustable: bool = True

    def check(self, formats: Collection[str]) -> None:
        """Check that the options apply to a file of one of `formats`, which may include BINARY ones.

        Raises:
            BadInput: they apply to none.
        """
        if not any(name in TABLES for name in formats):
            for option, given in (("--delimiter", self.delimiter), ("--no-header", not self.header)):
                if given:
                    raise BadInput(f"{option} applies to CSV and TSV files; there is none")
        if self.encoding and not set(formats) - BINARY:
            raise BadInput("--encoding applies to files of text, CSV, TSV and JSONL; there is none")


def parse(delimiter: str | None, encoding: str | None, no_header: bool) -> RowOptions:
    """The options as given on the command line.

    Raises:
        BadInput: the delimiter is not one character, or the encoding is unknown.
    """
    if delimiter is not None:
        delimiter = NAMED_DELIMITERS.get(delimiter.lower(), delimiter)
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise BadInput(f"--delimiter {delimiter!r}: not one character, such as ';' or '|', or the word tab")
    if encoding is not None:
        try:
            "".encode(encoding, "replace")  # codecs.lookup() alone also takes codecs from bytes to bytes, such as hex
            encoding = codecs.lookup(encoding).name
        except (LookupError, UnicodeError) as error:
            raise BadInput(f"--encoding {encoding}: unknown; such as utf-8, utf-16, cp1252, latin-1, shift_jis") from error
    return RowOptions(delimiter, encoding, not no_header)
