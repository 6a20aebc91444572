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

import unicodedata
from collections.abc import Iterator

import regex

MAX_MARKS = 30
BREAKS = {0x0B: "\n", 0x0C: "\n", 0x85: "\n"}
# Format characters that take no room; U+00AD is the soft hyphen, U+180E the Mongolian vowel separator.
INVISIBLE = r"\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0001"
CONTROLS = r"\u0000-\u0008\u000e-\u001f\u007f-\u0084\u0086-\u009f"
DROPPED = regex.compile(f"[{CONTROLS}{INVISIBLE}]")
TAGS = regex.compile(r"(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]+")
JOINING = "".join(rf"\p{{Script_Extensions={script}}}" for script in (
    "Arabic", "Syriac", "Thaana", "Nko", "Mandaic", "Mongolian", "Phags_Pa", "Adlam", "Manichaean", "Hanifi_Rohingya",
))  # fmt: skip
"""The scripts whose letters join."""
EMOJI = r"\p{Extended_Pictographic}\p{Emoji_Modifier}\ufe0f"
JOINERS = r"\u200c\u200d"
MEANINGLESS_JOINERS = regex.compile(
    rf"""(?<=[{JOINERS}])[{JOINERS}]+
    |(?!(?<=\p{{Canonical_Combining_Class=Virama}})[{JOINERS}].
       |(?<=[{JOINING}])[{JOINERS}][{JOINING}]
       |(?<=[{EMOJI}])\u200d[{EMOJI}])[{JOINERS}]""",
    regex.DOTALL | regex.VERBOSE,
)
MANY_MARKS = regex.compile(rf"[\P{{Canonical_Combining_Class=0}}\u0f73\u0f75\u0f81]{{{MAX_MARKS + 1},}}")
"""U+0F73, U+0F75 and U+0F81 have combining class 0, but decompose into two marks."""
SURROGATE = regex.compile(r"[\ud800-\udfff]")


def lower_cased(text: str) -> str:
    """`text` in lower case, character by character as the tokenizers library does it: a Σ at the end of a word becomes σ."""
    return "".join(map(str.lower, text))


def clean(text: str) -> str:
    """`text` in NFC without invisible characters. Cleaning twice changes nothing more."""
    if text.isascii() and text.isprintable():
        return text
    text = DROPPED.sub("", text.translate(BREAKS))
    text = MEANINGLESS_JOINERS.sub("", TAGS.sub("", text))
    return "".join(part if run else unicodedata.normalize("NFC", part) for run, part in _runs(text))


def has_surrogate(text: str) -> bool:
    """Whether `text` contains an unpaired surrogate, which is not a character and cannot be encoded as UTF-8."""
    return SURROGATE.search(text) is not None


def _runs(text: str) -> Iterator[tuple[bool, str]]:
    """The parts of `text`: runs of more than MAX_MARKS marks (True), and the text between them (False)."""
    end = 0
    for run in MANY_MARKS.finditer(text):
        yield False, text[end : run.start()]
        yield True, run[0]
        end = run.end()
    yield False, text[end:]
