"""Shortening of calibration texts to a number of tokens."""

from __future__ import annotations

import pytest

from qembed.quantize import calibration_texts
from qembed.quantize.calibration import LONG_TEXTS, SHORTEST, prepare, shorten
from tests.checkpoints import MakeCheckpoint


def row(number: int, length: int, last: int = 0) -> list[int]:
    """A row of `length` ids that all differ from those of other rows, with the id `last` at its end."""
    return [1000 * (number + 1) + place for place in range(length - 1)] + [last]


def test_rows_are_cut_to_one_length_within_the_budget() -> None:
    rows = [row(number, 20 + 10 * number) for number in range(64)]
    numbers = list(range(64))
    shortened = shorten(rows, numbers, 8000)
    assert sum(map(len, shortened)) <= 8000
    whole = numbers[::LONG_TEXTS]
    assert [len(shortened[number]) for number in whole] == [len(rows[number]) for number in whole]
    length = max(len(shortened[number]) for number in numbers if number not in whole)
    assert all(len(shortened[number]) in (length, len(rows[number])) for number in numbers)
    longer = [min(len(rows[number]), length + 1 if number not in whole else 10**9) for number in numbers]
    assert sum(longer) > 8000


@pytest.mark.parametrize("appended", [True, False])
def test_a_cut_row_ends_with_the_appended_token_if_there_is_one(appended: bool) -> None:
    rows = [row(number, 100, 0 if appended else 9000 + number) for number in range(20)]
    shortened = shorten(rows, list(range(20)), 20 * 30)
    cut = shortened[1]
    assert len(cut) < 100
    assert cut == [*rows[1][: len(cut) - 1], 0] if appended else cut == rows[1][: len(cut)]


def test_held_out_rows_and_few_texts_keep_their_length() -> None:
    rows = [row(number, 100) for number in range(40)]
    assert shorten(rows, range(40), 4000) == rows
    shortened = shorten(rows, range(20), 500)
    assert shortened[20:] == rows[20:]
    assert len(shortened[1]) == SHORTEST


def test_the_bundled_texts_are_within_the_budget(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    texts = calibration_texts.built_in()
    budget = 30_000
    calibration = prepare(texts, checkpoint, max_tokens=512, check=32, seed=0, token_budget=budget)
    whole = prepare(texts, checkpoint, max_tokens=512, check=32, seed=0)
    assert calibration.tokens <= budget < whole.tokens
    assert calibration.shortened > 100
    assert calibration.check == whole.check
    assert all(calibration.rows[number] == whole.rows[number] for number in whole.check)


def test_the_bundled_texts_are_distinct_and_well_formed() -> None:
    texts = calibration_texts.built_in(10**6).texts
    assert len(texts) == len({text.text for text in texts}) == 1265
    assert len({text.id for text in texts}) == 1265
