"""Mixed copies of calibration texts: additional inputs, made of the tokens of all texts.

A few hundred texts show a layer only few of the token combinations that it meets in use, so a layer fitted to them fits other
texts less well. A mixed copy is a piece of a text in which random tokens of all texts replace about half of the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

REPLACEMENT_PROBABILITY = 0.5


def mixed_copies(rows: Sequence[Sequence[int]], numbers: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """A mixed copy of each of the rows with these `numbers`, each with the last id of its row.

    Args:
        rows: the token ids of each text.
        numbers: indices of the rows to copy, which are also the rows to draw ids from.
        tokens: maximum length of a copy, which is a random piece of a longer text; 0 for no copies.
        seed: draws the pieces and the ids.
    """
    if not tokens:
        return []
    draw = random.Random(seed)
    pool = [token for number in numbers for token in rows[number][:-1]]
    return [_mixed_copy(rows[number], tokens, pool, draw) for number in numbers]


def _mixed_copy(row: Sequence[int], tokens: int, pool: Sequence[int], draw: random.Random) -> list[int]:
    start = draw.randrange(max(len(row) - tokens, 0) + 1)
    piece = row[start : start + tokens - 1] if len(row) > tokens else row[:-1]
    return [draw.choice(pool) if draw.random() < REPLACEMENT_PROBABILITY else token for token in piece] + [row[-1]]
