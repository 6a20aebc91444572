"""The fidelity section of a model card: `quantize` writes it first, `eval --card` replaces it."""

from __future__ import annotations

import hashlib
import re

FILE = "README.md"
HEADING = "## How near it is to its source"
BEGIN, END = "<!-- qembed eval: begin -->", "<!-- qembed eval: end -->"
SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)


def section(body: str) -> str:
    """The section with heading and markers, and `body` as its text."""
    return f"{BEGIN}\n{HEADING}\n\n{body.strip()}\n{END}"


def with_section(card: str, body: str) -> str:
    """`card` with the section's text replaced by `body`; a card without the section gets it at its end."""
    written = section(body)
    changed, count = SECTION.subn(lambda _: written, card, count=1)
    return changed if count else f"{card.rstrip()}\n\n{written}\n".lstrip()


def digest(card: bytes) -> str:
    """SHA-256 of the card without its section, in hexadecimal.

    `eval --card` replaces the section; so the card still matches the manifest, whenever a run is interrupted.
    """
    marked = re.compile(SECTION.pattern.encode(), re.DOTALL)
    return hashlib.sha256(marked.sub(b"", card, count=1)).hexdigest()
