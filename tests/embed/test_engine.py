"""Batches of a window: the longest texts first, bounded in texts and in tokens."""

from __future__ import annotations

import pytest

from qembed.embed.engine import sorted_batches
from qembed.embed.windows import Item


@pytest.mark.parametrize(
    ("most_items", "most_tokens", "batches"),
    [
        (9, 99, [[3, 1, 4, 0, 2]]),
        (2, 99, [[3, 1], [4, 0], [2]]),
        (9, 10, [[3], [1, 4], [0, 2]]),
        (9, 1, [[3], [1], [4], [0], [2]]),
    ],
)
def test_a_window_is_sorted_by_length_and_cut_into_batches(most_items: int, most_tokens: int, batches: list[list[int]]) -> None:
    items = [Item(str(length), "", "", length, None, {}) for length in (4, 5, 2, 12, 5)]
    assert sorted_batches(items, most_items, most_tokens) == batches
