"""Cleans texts for a model: Unicode NFC, without invisible characters.

Removed are control characters (tab and line breaks stay; vertical tab, form feed and "next line" become line breaks),
zero-width characters, direction marks, and the like. The Unicode plane does not matter: emoji, rare Han and private-use
characters stay. Two invisible characters carry meaning in some scripts and stay there: the zero-width joiner inside an emoji,
and joiner and non-joiner after a virama or between joining letters (rule CONTEXTJ of RFC 5892). The tags inside an emoji flag
stay too.

More than 30 combining marks on one character, which no language uses (UAX #15, Stream-Safe Text), keep their order: Python
sorts them in quadratic time, and a request of 32 MiB of them would block the server for days.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache

BREAKS = {0x0B: "\n", 0x0C: "\n", 0x85: "\n"}
KEPT = "\t\n\r"
JOINERS = "\u200c\u200d"
VIRAMA = 9
MOST_MARKS = 30
# Format characters that take no room; U+00AD is the soft hyphen, U+180E the Mongolian vowel separator.
INVISIBLE = "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0001"
CONTROLS = "\u0000-\u0008\u000e-\u001f\u007f-\u0084\u0086-\u009f"
DROPPED = re.compile(f"[{CONTROLS}{INVISIBLE}]")
TAGS = re.compile("(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]+")
JOINER = re.compile(f"[{JOINERS}]")
SURROGATE = re.compile("[\ud800-\udfff]")
# Scripts whose letters join: Arabic, Syriac, Thaana, N'Ko, Mandaic, Mongolian, Phags-pa, Adlam.
JOINING = re.compile("[\u0600-\u08ff\u1800-\u18af\ua840-\ua87f\ufb50-\ufdff\ufe70-\ufefe\U0001e900-\U0001e95f]")
EMOJI = re.compile("[\u00a9\u00ae\u203c\u2049\u2122-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff]")


def clean(text: str) -> str:
    """`text` in NFC without invisible characters. Cleaning twice changes nothing more."""
    if text.isascii() and text.isprintable():
        return text
    text = DROPPED.sub("", text.translate(BREAKS))
    text = TAGS.sub("", text)
    if JOINER.search(text):
        text = JOINER.sub(lambda found: found[0] if _joins(text, found.start()) else "", text)
    return "".join(part if run else unicodedata.normalize("NFC", part) for run, part in _runs(text))


def has_surrogate(text: str) -> bool:
    """Whether `text` contains an unpaired surrogate, which is not a character and cannot be encoded as UTF-8."""
    return SURROGATE.search(text) is not None


def _runs(text: str) -> Iterator[tuple[bool, str]]:
    """The parts of `text`: runs of more than 30 marks (True), and the text between them (False)."""
    end = 0
    for found in _many_marks().finditer(text):
        yield False, text[end : found.start()]
        yield True, found[0]
        end = found.end()
    yield False, text[end:]


@cache
def _many_marks() -> re.Pattern[str]:
    marks = "".join(map(re.escape, filter(unicodedata.combining, map(chr, range(sys.maxunicode + 1)))))
    return re.compile(f"[{marks}]{{{MOST_MARKS + 1},}}")


def _joins(text: str, at: int) -> bool:
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if not before or not after:
        return False
    if unicodedata.combining(before) == VIRAMA or (JOINING.match(before) and JOINING.match(after)):
        return True
    return text[at] == "\u200d" and bool(EMOJI.match(before) and EMOJI.match(after))
