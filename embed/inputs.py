"""Which files are read, in which order, and the format of each."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qembed.errors import BadInput
from qembed.text.cleaning import has_surrogate
from qembed.text.display import one_line
from qembed.text.rows.reader import FORMATS

STDIN = "-"
BESIDE = (".ids.jsonl", ".rejects.jsonl")
"""Endings of the files that a run writes beside its output; in a folder of inputs they are skipped."""
DOCUMENTS = (".pdf", ".docx", ".html", ".htm", ".md")
TEXT_DOCUMENTS = (".txt", ".md")
"""Documents in plain text of some encoding; HTML declares its own."""


@dataclass(frozen=True)
class File:
    """An input file with its `format` ("txt", "jsonl", …, or "document"); `name` identifies it in ids and messages."""

    path: Path
    name: str
    format: str

    @property
    def row_format(self) -> str:
        """What the options of `qembed.text.rows` apply to: a format of rows, or "binary" for a document that is no text."""
        if self.format != "document":
            return self.format
        return "txt" if self.name == STDIN or self.path.suffix.lower() in TEXT_DOCUMENTS else "binary"

    @property
    def size(self) -> int:
        """Bytes; 0 for standard input."""
        return 0 if self.name == STDIN else self.path.stat().st_size


@dataclass(frozen=True)
class Inputs:
    """All input files in reading order; `folder`: they come from a folder, so ids include file names.

    `skipped` counts files whose name tells no format; `unfit` names those that are no files, with the reason.
    """

    files: list[File]
    folder: bool
    skipped: int = 0
    unfit: tuple[str, ...] = ()


def find(argument: str, format: str | None, text_is: str) -> Inputs:  # noqa: A002
    """The files named by `argument`: a file, a folder with everything below it, or "-" for standard input.

    `format` applies to files whose suffix names none. `text_is` says what a `.txt` contains: "lines", each a text, or one
    "document".

    Raises:
        BadInput: nothing is there, or nothing in a supported format.
    """
    if argument == STDIN:
        if format == "parquet":
            raise BadInput("-: Parquet cannot be read from standard input, because its index is at the end; give the file")
        return Inputs([File(Path("/dev/stdin"), STDIN, _text(format or "txt", text_is))], False)
    path = Path(argument).expanduser()
    if path.is_dir():
        if format is not None:
            raise BadInput(f"{path}: --input-format applies to one file; in a folder the suffixes decide")
        paths, unfit = [], []
        for file in _below(path):
            if (reason := _unfit(file)) is not None:
                unfit.append(f"{one_line(os.fsencode(file).decode(errors='backslashreplace'))}: skipped: {reason}")
            elif not file.name.endswith(BESIDE):
                paths.append(file)
        formats = [(file, _format(file, text_is)) for file in paths]
        files = [File(file, file.relative_to(path).as_posix(), file_format) for file, file_format in formats if file_format]
        if not files:
            raise BadInput(f"{path}: no supported file there: {', '.join([*FORMATS, *DOCUMENTS])}")
        return Inputs(files, True, len(formats) - len(files), tuple(unfit))
    if not path.exists():
        raise BadInput(f"{argument}: no such file or folder")
    if stat.S_ISCHR(mode := path.stat().st_mode) or stat.S_ISBLK(mode):
        raise BadInput(f"{argument}: a device; name a file or a folder, or - for standard input")
    file_format = _text(format, text_is) if format else _format(path, text_is)
    if file_format is None:
        raise BadInput(f"{path}: unknown suffix; supported are {', '.join([*FORMATS, *DOCUMENTS])}; or give --input-format")
    return Inputs([File(path, path.name, file_format)], False)


def _below(folder: Path) -> Iterator[Path]:
    """The files below a folder, sorted by path; hidden ones (names that start with a dot) are left out."""
    for top, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(top, name) for name in sorted(names) if not name.startswith("."))


def _unfit(path: Path) -> str | None:
    """Why something in a folder cannot be read; None if it can."""
    if has_surrogate(str(path)):
        return "its name is not UTF-8"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link that leads to no file" if path.is_symlink() else error.strerror or str(error)
    return None if stat.S_ISREG(mode) else "a device, pipe or socket"


def _format(path: Path, text_is: str) -> str | None:
    suffix = path.suffix.lower()
    if suffix in DOCUMENTS:
        return "document"
    return _text(FORMATS[suffix], text_is) if suffix in FORMATS else None


def _text(format: str, text_is: str) -> str:  # noqa: A002
    return "document" if format == "txt" and text_is == "document" else format
