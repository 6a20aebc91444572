"""Extracts the text of whole documents, with page offsets if there are pages. Libraries parse the formats (extra `docs`)."""

from __future__ import annotations

import codecs
import io
import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from qembed.errors import MissingExtra
from qembed.installation import how_to_install

BREAK = "\n\n"


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
        NotReadable: it is damaged, encrypted, or not UTF-8.
        MissingExtra: the library for this kind is not installed.
    """
    readers: dict[str, Callable[[bytes], Document]] = {
        ".pdf": _pdf,
        ".docx": _docx,
        ".html": _html,
        ".htm": _html,
        ".md": _markdown,
    }
    try:
        return readers.get(kind, _plain)(content)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{kind} needs {error.name}; install the readers of documents: {how_to_install('docs')}") from error


def _plain(content: bytes) -> Document:
    try:
        return Document(content.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise NotReadable(f"not UTF-8 (byte {error.start + 1})") from error


def _pdf(content: bytes) -> Document:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise NotReadable("encrypted PDF")
        pages = [_whole(page.extract_text()) for page in reader.pages]
    except NotReadable:
        raise
    except Exception as error:
        raise NotReadable(f"damaged PDF: {type(error).__name__}: {error}"[:300]) from error
    if not any(page.strip() for page in pages):
        raise NotReadable("PDF without text (scanned pages?)")
    starts, length = [], 0
    for page in pages:
        starts.append(length)
        length += len(page) + len(BREAK)
    return Document(BREAK.join(pages), tuple(starts))


def _docx(content: bytes) -> Document:
    from qembed.embed import docx_text

    try:
        return Document(_whole(docx_text.text(content)))
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise NotReadable(f"damaged DOCX: {type(error).__name__}: {error}"[:300]) from error


def _html(content: bytes) -> Document:
    from qembed.embed import html_text

    try:
        return Document(html_text.text(content))
    except RecursionError as error:
        raise NotReadable("HTML is nested too deeply") from error


def _markdown(content: bytes) -> Document:
    import markdown_it

    from qembed.embed import front_matter

    text = front_matter.without(_plain(content).text)
    return _html(markdown_it.MarkdownIt("commonmark").enable("table").render(text).encode())


def _whole(text: str) -> str:
    """`text` without unpaired surrogates, which PDFs and other formats can contain."""
    return text.encode("utf-8", "replace").decode()
