"""Texts on a screen."""

from __future__ import annotations

import json
import unicodedata

LINE_CHARACTERS = "\t"


def escaped(text: str, keep: str = LINE_CHARACTERS) -> str:
    """`text` with control, format and unassigned characters as JSON escapes, so that none controls a terminal or turns a line.

    Those in `keep` stay. In JSON only strings can have such characters, so JSON stays the same value.
    """
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in keep or unicodedata.category(sign) == "Zs" else json.dumps(sign)[1:-1]
        for sign in text
    )


def one_line(text: str) -> str:
    """`text` without line breaks, and without characters that control a terminal or reverse the direction of a line."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`count` with its noun: "1 row", "2,000 rows"; `plural` where it does not end in s alone."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
