"""Calibration texts once more, shuffled into each other: inputs that no text has, made of the tokens that texts have.

A few hundred texts show a layer few of the combinations that it will meet, and what is fitted to them fits others less
well. A mixed copy is a piece of a text half of whose tokens come from anywhere in the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

REPLACED = 0.5


def mixed(rows: Sequence[Sequence[int]], numbers: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """One mixed copy of each of the rows with these `numbers`, of at most `tokens` ids, its own last id kept.

    Args:
        rows: the token ids of each text.
        numbers: which rows to copy, and to draw ids from.
        tokens: where a copy is cut: which piece of a longer text it is, `seed` decides; 0 for no copies.
        seed: draws pieces and ids.
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
