"""Extracts the text of whole documents, with page offsets if there are pages. Libraries parse the formats (extra `docs`)."""

from __future__ import annotations

import codecs
import io
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qembed.errors import MissingExtra
from qembed.installation import how_to_install

NO_TEXT = {"script", "style", "template", "noscript", "head", "title", "svg"}
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption"),
    *("figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre"),
    *("section", "summary", "table", "td", "th", "tr", "ul", "caption"),
}
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
    import docx

    try:
        document = docx.Document(io.BytesIO(content))
        return Document(_whole(BREAK.join(_docx_blocks(document))))
    except Exception as error:
        raise NotReadable(f"damaged DOCX: {type(error).__name__}: {error}"[:300]) from error


def _docx_blocks(document: Any) -> Iterator[str]:
    """Paragraphs and table rows in document order."""
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            yield "\n".join("\t".join(cell.text for cell in row.cells) for row in block.rows)
        elif block.text.strip():
            yield block.text


def _html(content: bytes) -> Document:
    import bs4

    parsed = bs4.BeautifulSoup(content, "html.parser")
    pieces: list[str] = []
    try:
        _collect(parsed, pieces, False)
    except RecursionError as error:
        raise NotReadable("HTML is nested too deeply") from error
    lines = (line.strip() for line in "".join(pieces).split("\n"))
    return Document(re.sub(r"\n{3,}", BREAK, "\n".join(lines)).strip())


def _collect(element: Any, pieces: list[str], verbatim: bool) -> None:
    """Append the text of `element`: white space as in a browser, an empty line between blocks."""
    from bs4.element import NavigableString, Tag

    for child in element.children:
        if isinstance(child, Tag):
            if child.name in NO_TEXT:
                continue
            edge = BREAK if child.name in BLOCKS else ""
            pieces.append("\n" if child.name == "br" else edge)
            _collect(child, pieces, verbatim or child.name == "pre")
            pieces.append(edge)
        elif type(child) is NavigableString:  # comments and the like are of sub-classes
            pieces.append(str(child) if verbatim else re.sub(r"\s+", " ", child))


def _markdown(content: bytes) -> Document:
    import markdown_it

    text = _plain(content).text
    front_matter = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    rendered = markdown_it.MarkdownIt("commonmark").enable("table").render(text[front_matter.end() if front_matter else 0 :])
    return _html(rendered.encode())


def _whole(text: str) -> str:
    """`text` without unpaired surrogates, which PDFs and other formats can contain."""
    return text.encode("utf-8", "replace").decode()
