"""Texts on a screen."""

from __future__ import annotations


def one_line(text: str) -> str:
    """`text` without line breaks, and without characters that control a terminal or reverse the direction of a line."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
