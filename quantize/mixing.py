"""Mixed copies of calibration texts: pieces in which half of the tokens are replaced by random tokens of all texts.

A few hundred texts contain few of the token combinations that a layer will meet. Mixed copies add combinations that no text
has, so that what is fitted to the texts generalizes better.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

REPLACED = 0.5


def mixed(rows: Sequence[Sequence[int]], numbers: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """A mixed copy of each row in `numbers`, with at most `tokens` ids; the row's last id stays last.

    Args:
        rows: token ids of each text.
        numbers: indices of the rows to copy and to draw ids from.
        tokens: length of a copy, a random piece of a longer text; 0 for no copies.
        seed: of pieces and ids.
    """
    if not tokens:
        return []
    draw = random.Random(seed)
    pool = [token for number in numbers for token in rows[number][:-1]]
    return [_copy(rows[number], tokens, pool, draw) for number in numbers]


def _copy(row: Sequence[int], tokens: int, pool: Sequence[int], draw: random.Random) -> list[int]:
    start = draw.randrange(max(len(row) - tokens, 0) + 1)
    piece = row[start : start + tokens - 1] if len(row) > tokens else row[:-1]
    return [draw.choice(pool) if draw.random() < REPLACED else token for token in piece] + [row[-1]]
