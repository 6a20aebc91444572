"""The text of an HTML page as a browser shows it: an empty line between blocks, a line per table row, no scripts."""

from __future__ import annotations

import re
from typing import Any

NO_TEXT = {"script", "style", "template", "noscript", "svg", "datalist"}
BLOCKS = {
    *(
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "dd",
        "details",
        "dialog",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
    ),
    *("figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hgroup", "hr", "legend", "li", "main"),
    *(
        "menu",
        "nav",
        "ol",
        "p",
        "pre",
        "search",
        "section",
        "select",
        "summary",
        "table",
        "td",
        "textarea",
        "th",
        "title",
        "tr",
    ),
    *("ul", "caption", "video", "audio", "object", "iframe"),
    *("center", "dir", "frameset", "noframes", "listing", "marquee", "plaintext", "xmp"),
}
LINES = {"option", "optgroup", "label", "button", "input", "img"}
"""Elements that separate text onto a new line although they are not blocks."""
VERBATIM = {"pre", "textarea", "listing", "plaintext", "xmp"}
BREAK = "\n\n"


def text(content: bytes) -> str:
    """The text of a page, the title first.

    Raises:
        RecursionError: the elements are nested too deeply.
    """
    import bs4

    pieces: list[str] = []
    _collect(bs4.BeautifulSoup(content, "html.parser"), pieces, False)
    lines = (line.strip() for line in "".join(pieces).split("\n"))
    return re.sub(r"\n{3,}", BREAK, "\n".join(lines)).strip()


def _collect(element: Any, pieces: list[str], verbatim: bool) -> None:
    """Append the text of `element`: white space as in a browser."""
    from bs4.element import NavigableString, RubyParenthesisString, RubyTextString, Tag

    shown = (NavigableString, RubyParenthesisString, RubyTextString)

    for child in element.children:
        if isinstance(child, Tag):
            if child.name in NO_TEXT:
                continue
            edge = BREAK if child.name in BLOCKS else "\n" if child.name in LINES else ""
            pieces.append("\n" if child.name == "br" else edge)
            _collect(child, pieces, verbatim or child.name in VERBATIM)
            pieces.append(edge)
        elif type(child) in shown:  # comments and the like are of other sub-classes
            pieces.append(str(child) if verbatim else re.sub(r"\s+", " ", child))
