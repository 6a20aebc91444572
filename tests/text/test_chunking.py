"""Chunks of long texts: their borders, sizes, overlap, and positions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from qembed.checkpoint.find import SAMPLE, find
from qembed.text.chunking import chunks


@cache
def tokenizer() -> Tokenizer:
    """The sample's tokenizer, loaded once."""
    return find(SAMPLE).tokenizer()


def count(texts: Sequence[str]) -> list[int]:
    return [len(encoding.ids) for encoding in tokenizer().encode_batch(list(texts))]


def test_chunks_end_with_paragraphs_and_sentences() -> None:
    paragraphs = [" ".join(f"This is sentence {n} of paragraph {p}." for n in range(6)) for p in range(4)]
    text = "\n\n".join(paragraphs)
    parts_of_text = [text[span.start : span.end] for span in chunks(text, 48, 0, count)]
    assert all(part.endswith(".") for part in parts_of_text)
    assert all(part.startswith("This is sentence") for part in parts_of_text)
    assert " ".join(parts_of_text).split() == text.split()
    paragraph_chunks = [text[span.start : span.end] for span in chunks(text, max(count(paragraphs)) + 4, 0, count)]
    assert paragraph_chunks == paragraphs


def test_random_texts_are_covered_by_chunks_within_the_size_and_overlap() -> None:
    draw = random.Random(0)
    words = ["alpha", "beta", "x", "Übung", "слово", "漢字", "don't"]
    kinds: list[Any] = [
        lambda: (
            " ".join(draw.choice(words) for _ in range(draw.randint(1, 40))) + draw.choice([". ", "! ", ".\n", "\n\n", " "])
        ),
        lambda: "汉字测试。" * draw.randint(1, 9),
        lambda: "a" * draw.randint(1, 900),
        lambda: " \n" * draw.randint(1, 9),
        lambda: "\n\n \n".join("x" for _ in range(draw.randint(1, 60))),
        lambda: "\u0301" * draw.randint(1, 50),
    ]
    for _ in range(40):
        text = "".join(draw.choice(kinds)() for _ in range(draw.randint(1, 30)))
        size = draw.choice([4, 16, 64, 512])
        overlap = draw.choice([0, 2, size // 4])
        spans = list(chunks(text, size, overlap, count))
        covered = bytearray(len(text))
        for before, after in pairwise(spans):
            assert before.start < after.start
            assert before.end < after.end
            if after.start < before.end:
                assert count([text[after.start : before.end]])[0] <= overlap + 1  # the appended token is not shared
        for span in spans:
            part = text[span.start : span.end]
            assert part == part.strip()
            assert count([part])[0] <= size or len(part) == 1
            covered[span.start : span.end] = b"\1" * len(part)
        assert all(is_covered or letter.isspace() for is_covered, letter in zip(covered, text, strict=True))


def test_adjacent_chunks_share_the_overlap() -> None:
    text = " ".join(f"Sentence number {n} is short." for n in range(60))
    spans = list(chunks(text, 64, 16, count))
    assert len(spans) > 4
    for before, after in pairwise(spans):
        assert 4 <= count([text[after.start : before.end]])[0] <= 17
    without_stops = "word " * 500
    spans = list(chunks(without_stops, 64, 16, count))
    assert all(after.start < before.end for before, after in pairwise(spans))
