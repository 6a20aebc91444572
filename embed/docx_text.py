"""The text of a DOCX file in reading order, as Word shows it with all tracked changes accepted.

python-docx leaves out the text of content controls and tracked insertions, repeats merged cells and skips nested tables, so the
elements are walked here (ECMA-376, part 1, section 17). python-docx opens the file and its parts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from qembed.embed import docx_symbols

BREAK = "\n\n"
W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
M = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
MC = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
REMOVED = {
    f"{W}{name}" for name in ("del", "moveFrom", "delText", "instrText", "delInstrText", "pPr", "rPr", "sdtPr", "sdtEndPr")
}
"""Tracked deletions, codes of fields, and properties."""
SIGNS = {f"{W}tab": "\t", f"{W}ptab": "\t", f"{W}br": "\n", f"{W}cr": "\n", f"{W}noBreakHyphen": "-", f"{W}softHyphen": ""}
NOTES = ("footnotes", "endnotes", "comments")


def text(content: bytes) -> str:
    """Headers, the body, footers, then footnotes, endnotes and comments, each once, with an empty line between paragraphs.

    Raises:
        Exception: any error of python-docx for a damaged file.
    """
    import docx

    document = docx.Document(io.BytesIO(content))
    body = list(_blocks(document.element.body))
    headers, footers = (list(dict.fromkeys(_running(document, part))) for part in ("header", "footer"))
    return BREAK.join([*headers, *body, *footers, *_notes(document)])


def _running(document: Any, kind: str) -> Iterator[str]:
    """The blocks of the headers or footers of all sections."""
    for section in document.sections:
        for variant in ("", "first_page_", "even_page_"):
            part = getattr(section, f"{variant}{kind}")
            if not part.is_linked_to_previous:
                yield from _blocks(part._element)


def _notes(document: Any) -> Iterator[str]:
    from lxml import etree

    for name in NOTES:
        for relation in document.part.rels.values():
            if relation.reltype.endswith(f"/{name}") and not relation.is_external:
                parser = etree.XMLParser(resolve_entities=False, no_network=True)
                yield from _blocks(etree.fromstring(relation.target_part.blob, parser))


def _children(element: Any) -> Iterator[Any]:
    """The elements in `element` that may hold text; of content that stands twice only the form for newer readers."""
    for child in element:
        if child.tag in REMOVED or not isinstance(child.tag, str):
            continue
        if child.tag == f"{MC}AlternateContent":
            choice = child.find(f"{MC}Choice")
            yield from _children(child if choice is None else choice)
        else:
            yield child


def _blocks(element: Any) -> Iterator[str]:
    """The paragraphs and tables below `element`; text boxes follow the paragraph that they are anchored in."""
    for child in _children(element):
        if child.tag == f"{W}p":
            boxes: list[Any] = []
            paragraph = "".join(_inline(child, boxes))
            if paragraph.strip():
                yield paragraph
            for box in boxes:
                yield from _blocks(box)
        elif child.tag == f"{W}tbl":
            rows = ["\t".join(cells) for cells in _rows(child) if any(cell.strip() for cell in cells)]
            if rows:
                yield "\n".join(rows)
        else:
            yield from _blocks(child)


def _rows(table: Any) -> Iterator[list[str]]:
    """The cells of each row; a cell that is merged with others stands once, where it begins."""
    for row in _nearest(table, f"{W}tr"):
        marks = row.find(f"{W}trPr")
        if marks is not None and marks.find(f"{W}del") is not None:
            continue
        yield ["\n".join(_blocks(cell)) for cell in _nearest(row, f"{W}tc") if not _is_left_out(cell)]


def _nearest(element: Any, tag: str) -> Iterator[Any]:
    """The elements `tag` below `element`, also in content controls, but not those inside each other."""
    for child in _children(element):
        if child.tag == tag:
            yield child
        else:
            yield from _nearest(child, tag)


def _is_left_out(cell: Any) -> bool:
    """Whether the cell is deleted, or continues the merged cell above it or before it."""
    properties = cell.find(f"{W}tcPr")
    if properties is None:
        return False
    merges = (properties.find(f"{W}{name}") for name in ("vMerge", "hMerge"))
    continues = any(merge is not None and merge.get(f"{W}val", "continue") == "continue" for merge in merges)
    return continues or properties.find(f"{W}cellDel") is not None


def _inline(element: Any, boxes: list[Any]) -> Iterator[str]:
    """The text of a paragraph; its text boxes are appended to `boxes`."""
    for child in _children(element):
        if child.tag in (f"{W}t", f"{M}t"):
            yield child.text or ""
        elif child.tag in SIGNS:
            yield SIGNS[child.tag]
        elif child.tag == f"{W}sym":
            yield docx_symbols.character(child.get(f"{W}font", ""), child.get(f"{W}char", ""))
        elif child.tag == f"{W}ruby":
            base, reading = (_ruby(child, name, boxes) for name in ("rubyBase", "rt"))
            yield f"{base}({reading})" if base and reading else base or reading
        elif child.tag == f"{W}txbxContent":
            boxes.append(child)
        else:
            yield from _inline(child, boxes)


def _ruby(element: Any, name: str, boxes: list[Any]) -> str:
    """A part of annotated text: the base, or its reading, which stands before the base in the file and above it on the page."""
    return "".join(piece for part in element.findall(f"{W}{name}") for piece in _inline(part, boxes)).strip()
