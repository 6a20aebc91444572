"""Extracts the text of whole documents, with page offsets if there are pages. Libraries parse the formats (extra `docs`).

They run in a process of their own (`document_process`), with limits: a document is not to be trusted.
"""

from __future__ import annotations

import codecs
import io
import logging
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qembed.errors import MissingExtra
from qembed.installation import how_to_install

BREAK = "\n\n"
LARGEST = 2**28
"""Bytes of a document."""
UNPACKED = 2**29
"""Bytes of all parts of a DOCX file, which is a ZIP archive."""
LONGEST_TEXT = 2**26
"""Characters of a document."""


class NotReadable(Exception):
    """A document has no extractable text; the message is the reason in the rejects file."""


@dataclass(frozen=True)
class Document:
    """The text of a document; `pages` are the offsets of its pages, empty if it has none."""

    text: str
    pages: tuple[int, ...] = ()

    def page(self, offset: int) -> int | None:
        """The page number, from 1, of the character at `offset`."""
        return bisect_right(self.pages, offset) if self.pages else None


def read(content: bytes, kind: str) -> Document:
    """The text of a document; `kind` is its suffix: ".pdf", ".docx", ".html", ".htm", ".md" or ".txt".

    Raises:
        NotReadable: it is damaged, encrypted or not UTF-8, or takes more memory or time than documents may.
        MissingExtra: the library for this kind is not installed.
        QembedError: no process to read it in can be started.
    """
    from qembed.child.process import TooMuch
    from qembed.embed import document_process

    if kind not in PARSED:
        return _limited(_plain(content))
    try:
        text, pages = document_process.read(content, kind)
    except (TooMuch, document_process.Refused) as error:
        raise NotReadable(str(error)) from error
    except document_process.Missing as error:
        raise MissingExtra(f"{kind} needs {error}; install the readers of documents: {how_to_install('docs')}") from error
    return Document(text, tuple(pages))


def parse(content: bytes, kind: str) -> Document:
    """The text of a document of one of the kinds PARSED, in this process.

    Raises:
        NotReadable: it is damaged, encrypted or not UTF-8, or larger than documents may be.
        ModuleNotFoundError: the library for this kind is not installed.
    """
    try:
        return _limited(PARSED[kind](content))
    except (MemoryError, ModuleNotFoundError, NotReadable):
        raise
    except RecursionError as error:
        raise NotReadable("nested too deeply") from error
    except Exception as error:  # the parsers raise many types, AssertionError among them
        reason = " ".join(str(error).split())
        raise NotReadable(f"damaged {NAMES[kind]}: {type(error).__name__}: {reason}"[:300]) from error


def _limited(document: Document) -> Document:
    if len(document.text) > LONGEST_TEXT:
        raise NotReadable(f"has {len(document.text):,} characters of text; at most {LONGEST_TEXT:,} are read")
    return document


def _plain(content: bytes) -> Document:
    try:
        return Document(content.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise NotReadable(f"not UTF-8 (byte {error.start + 1})") from error


def _pdf(content: bytes) -> Document:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)
    reader = pypdf.PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise NotReadable("encrypted PDF")
    pages = [_whole(page.extract_text()) for page in reader.pages]
    if not any(page.strip() for page in pages):
        raise NotReadable("PDF without text (scanned pages?)")
    starts, length = [], 0
    for page in pages:
        starts.append(length)
        length += len(page) + len(BREAK)
    return Document(BREAK.join(pages), tuple(starts))


def _docx(content: bytes) -> Document:
    from qembed.embed import docx_text

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > UNPACKED:
        raise NotReadable(f"unpacks to {size >> 20:,} MiB; at most {UNPACKED >> 20} MiB are read")
    return Document(_whole(docx_text.text(content)))


def _html(content: bytes) -> Document:
    from qembed.embed import html_text

    return Document(_whole(html_text.text(content)))


def _markdown(content: bytes) -> Document:
    import markdown_it

    from qembed.embed import front_matter

    text = front_matter.without(_plain(content).text)
    return _html(markdown_it.MarkdownIt("commonmark").enable("table").render(text).encode())


def _whole(text: str) -> str:
    """`text` without unpaired surrogates, which PDFs and other formats can contain."""
    return text.encode("utf-8", "replace").decode()


PARSED: Mapping[str, Callable[[bytes], Document]] = {
    ".pdf": _pdf,
    ".docx": _docx,
    ".html": _html,
    ".htm": _html,
    ".md": _markdown,
}
"""Kinds of documents that a library parses."""
NAMES = {".pdf": "PDF", ".docx": "DOCX", ".html": "HTML", ".htm": "HTML", ".md": "Markdown"}
