"""Texts on a screen."""

from __future__ import annotations


def one_line(text: str) -> str:
    """`text` without line breaks, and without characters that control a terminal or reverse the direction of a line."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`count` with its noun: "1 row", "2,000 rows"; `plural` where it does not end in s alone."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
