"""Text cleaning removes invisible characters and keeps those that carry meaning."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from qembed.text.cleaning import MAX_MARKS, clean, has_surrogate


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("e\u0301", "é"),
        ("\u1100\u1161", "가"),
        ("a\u200bb\u2060c\ufeffd", "abcd"),
        ("a\u200db\u200cc", "abc"),
        ("bell\x07 null\x00 delete\x7f c1\x9f", "bell null delete c1"),
        ("\u202eabc\u202c \u2066x\u2069", "abc x"),
        ("soft\u00adhyphen", "softhyphen"),
        ("page\x0cbreak\x0btab\x85line", "page\nbreak\ntab\nline"),
        ("x\U000e0041\U000e0042", "x"),
        ("e\u200b\u0301", "é"),
    ],
)
def test_invisible_characters_are_removed(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    assert clean(cleaned) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "tab\tline\nreturn\r\n",
        "family 👨‍👩‍👧‍👦, coder 👩🏽‍💻, flag 🏳️‍🌈, heart ❤️",
        "England 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "rare Han 𠮷 𠀀 𪚥 \U00030000",
        "می‌خواهم",
        "क्‍ष क्‌ष",
        "private \ue000 \U000f0000",
        "variation 葛\U000e0100",
        "𝕸𝖆𝖙𝖍 𐎠 𓀀",
        "ﬁ Å² ½",
    ],
)
def test_characters_with_meaning_stay(text: str) -> None:
    assert clean(text) == text


def test_a_million_combining_marks_are_fast_and_keep_their_order() -> None:
    """Python's own normalization would take most of an hour."""
    marks = "\u0301\u0316" * 1_000_000
    assert clean(f"e\u0301 a{marks} e\u0301") == f"é a{marks} é"
    assert clean("a" + "\u0316\u0301" * 15) == clean("a" + "\u0301\u0316" * 15)


def test_python_never_sorts_a_long_run_of_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sorts a run of marks in quadratic time. Runs are counted as Python sees them, decomposed."""
    normalize, longest = unicodedata.normalize, 0

    def normalize_counted(form: str, text: str) -> str:
        nonlocal longest
        marks = 0
        for character in normalize("NFD", text):
            marks = marks + 1 if unicodedata.combining(character) else 0
            longest = max(longest, marks)
        return normalize(form, text)

    monkeypatch.setattr(unicodedata, "normalize", normalize_counted)
    first_a_mark = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(normalize("NFD", c)[0])]
    assert "\u0f73" in first_a_mark
    for character in first_a_mark:
        clean("a" + character * 500)
    clean("a" + "".join(first_a_mark) * 20)
    assert longest <= 2 * MAX_MARKS + 2


def test_repeated_joiners_are_removed_between_letters_and_reduced_to_one_after_a_virama() -> None:
    assert clean("ی\u200c\u200cی") == "یی"
    assert clean("क्\u200d\u200dष") == "क्\u200dष"
    assert clean("क्\u200d") == "क्"
    assert clean("\u200d" * 1000 + "a") == "a"


def test_lone_surrogates_are_detected() -> None:
    assert has_surrogate("a\ud800")
    assert has_surrogate("\udfff")
    assert not has_surrogate("😀")
