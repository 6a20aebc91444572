"""Options of all commands that read tables: delimiter, encoding, header."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def row_options(section: Callable[..., Any], files: str = "") -> Callable[[Any], Any]:
    """The three options under a heading of `command/sections.py`. `files` says which files they apply to (" of --data")."""
    options = (
        section(
            "--delimiter",
            metavar="CHAR",
            help=f"What separates cells in CSV and TSV files{files}: a character, or tab.  [default: decided by the header]",
        ),
        section(
            "--encoding",
            metavar="NAME",
            help=f"Encoding of text files{files}, such as cp1252.  [default: UTF-8, or what a byte order mark says]",
        ),
        section(
            "--no-header",
            is_flag=True,
            help=f"CSV and TSV files{files} begin with a row, not with the names of the columns: these are 1, 2, and so on.",
        ),
    )

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
