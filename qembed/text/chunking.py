"""Splits long texts into chunks at paragraph and sentence boundaries, with their offsets. Pure functions.

A chunk takes as many whole pieces as fit. Pieces are sentences; a sentence that is too long is split between words, and a word
that is too long anywhere. A chunk ends with its paragraph if it is at least half full by then: short paragraphs are combined,
and long ones are split as rarely as possible. The next chunk starts with the last pieces of the previous one, as many as fit
into the overlap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
# After . ! ? … and closing quotes or brackets, before white space. After the full stops of Chinese, Japanese and Hindi, none is
# needed.
SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？।])[”’」』）]*\s*|\n+")
WORD = re.compile(r"\s+")
BATCH_PIECES = 256
"""Pieces per call of the tokenizer."""
CHARACTERS_PER_TOKEN = 16
"""A piece with more characters per token of the limit is split before it is tokenized."""

Count = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` of a text; `last`: a paragraph ends there."""

    start: int
    end: int
    last: bool = False


Piece = tuple[Span, int]
"""A span with its tokens."""


def chunks(text: str, size: int, overlap: int, count: Count) -> Iterator[Span]:
    """The chunks of `text` in order, without surrounding white space, each at most `size` tokens as `count` counts them.

    Adjacent chunks share up to `overlap` tokens: whole pieces, or words if no piece is that short. Every character of `text`
    that is not white space is in a chunk. `count` returns the number of tokens of each of several texts, including those that
    the model appends.
    """
    (appended,) = count([""])
    upcoming = ((piece, tokens - appended) for piece, tokens in _pieces_within(text, size, count))
    returned: list[Piece] = []
    current: list[Piece] = []
    new_pieces = 0
    while True:
        piece = returned.pop() if returned else next(upcoming, None)
        used = sum(tokens for _, tokens in current)
        full = piece is not None and used + piece[1] > size - appended
        if new_pieces and (piece is None or full or (current[-1][0].last and 2 * used >= size)):
            # White space between pieces may be tokens, too.
            while len(current) > 1 and count([text[current[0][0].start : current[-1][0].end]])[0] > size:
                if new_pieces > 1:
                    returned += [] if piece is None else [piece]
                    piece = current.pop()
                    new_pieces -= 1
                else:
                    current.pop(0)
            yield _span_of(current)
            room = 0 if piece is None else min(overlap, size - appended - piece[1])
            current = _tail(text, current, room, lambda part: count([part])[0] - appended)
            new_pieces = 0
        elif full:
            current = []
        if piece is None:
            return
        current.append(piece)
        new_pieces += 1


def _span_of(pieces: Sequence[Piece]) -> Span:
    return Span(pieces[0][0].start, pieces[-1][0].end, pieces[-1][0].last)


def _tail(text: str, pieces: list[Piece], allowed: int, count: Callable[[str], int]) -> list[Piece]:
    """The overlap with the next chunk: the last pieces of `held` that fit into `allowed` tokens, or the end of the last."""
    first = len(pieces)
    room = allowed
    while first > 1 and pieces[first - 1][1] <= room:
        first -= 1
        room -= pieces[first][1]
    while first < len(pieces) and count(text[pieces[first][0].start : pieces[-1][0].end]) > allowed:
        first += 1
    if first < len(pieces):
        return pieces[first:]
    last, tokens = pieces[-1]
    while tokens > allowed and last.end - last.start > 1:
        last = _halves(text, last)[-1]
        tokens = count(text[last.start : last.end])
    return [(last, tokens)] if 0 < tokens <= allowed and last != pieces[-1][0] else []


def _pieces_within(text: str, size: int, count: Count) -> Iterator[Piece]:
    """The pieces of `text` with their token counts, each at most `size`."""
    batch: list[Span] = []
    for piece in _pieces(text, size * CHARACTERS_PER_TOKEN):
        batch.append(piece)
        if len(batch) == BATCH_PIECES:
            yield from _halve_long(text, batch, size, count)
            batch = []
    yield from _halve_long(text, batch, size, count)


def _halve_long(text: str, pieces: Sequence[Span], size: int, count: Count) -> Iterator[Piece]:
    if not pieces:
        return
    for piece, tokens in zip(pieces, count([text[piece.start : piece.end] for piece in pieces]), strict=True):
        if tokens <= size or piece.end - piece.start <= 1:
            yield piece, tokens
        else:
            yield from _halve_long(text, _halves(text, piece), size, count)


def _halves(text: str, piece: Span) -> list[Span]:
    """A piece split in two near its middle, between words if possible."""
    middle = (piece.start + piece.end) // 2
    margin = (piece.end - piece.start) // 4
    border = next(WORD.finditer(text, middle, middle + margin), None)
    first, second = (border.start(), border.end()) if border and border.start() > piece.start else (middle, middle)
    if second >= piece.end:
        first = second = middle
    return [*_spans(text, piece.start, first, False), *_spans(text, second, piece.end, piece.last)]


def _pieces(text: str, longest: int) -> Iterator[Span]:
    """Sentences without surrounding white space, each at most `longest` characters."""
    for start, end in _split(text, PARAGRAPH, 0, len(text)):
        sentences = list(_split(text, SENTENCE, start, end))
        for number, (begin, stop) in enumerate(sentences, 1):
            last = number == len(sentences)
            while stop - begin > longest:
                border = next(WORD.finditer(text, begin + longest // 2, begin + longest), None)
                cut, next_begin = (border.start(), border.end()) if border else (begin + longest, begin + longest)
                yield from _spans(text, begin, cut, False)
                begin = next_begin
            yield from _spans(text, begin, stop, last)


def _spans(text: str, start: int, end: int, last: bool) -> Iterator[Span]:
    return (Span(*edges, last) for edges in _strip(text, start, end))


def _split(text: str, border: re.Pattern[str], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The spans between the borders, without surrounding white space; spans of white space only are left out."""
    begin = start
    for match in border.finditer(text, start, end):
        # A closing quotation mark belongs to the sentence; the white space after it does not.
        stop = match.start() + len(match[0].rstrip())
        yield from _strip(text, begin, stop)
        begin = match.end()
    yield from _strip(text, begin, end)


def _strip(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    part = text[start:end]
    left, right = start + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))
    if left < right:
        yield left, right
