"""Mixed copies are made of the tokens of the texts that they may be made of."""

from __future__ import annotations

from itertools import pairwise

from qembed.quantize.mixing import mixed

ROWS = [[*range(1, 101), 999], [*range(200, 220), 999], [7, 999], [*range(500, 600), 999]]


def test_a_copy_is_half_its_text_and_half_the_others() -> None:
    (copy, short, shortest) = mixed(ROWS, [0, 1, 2], 64, seed=0)
    assert [len(copy), len(short), len(shortest)] == [64, 21, 2]
    assert {copy[-1], short[-1], shortest[-1]} == {999}
    in_order = sum(after - before == 1 for before, after in pairwise(copy))
    assert 5 < in_order < 35  # of 63, a quarter if each of two neighbours is kept by the toss of a coin
    assert any(token >= 200 for token in copy[:-1])


def test_rows_that_are_kept_apart_lend_no_tokens() -> None:
    copies = mixed(ROWS, [0, 1, 2], 64, seed=1)
    assert not {token for copy in copies for token in copy} & set(range(500, 600))


def test_copies_differ_by_seed_alone() -> None:
    assert mixed(ROWS, [0, 1], 64, seed=0) == mixed(ROWS, [0, 1], 64, seed=0) != mixed(ROWS, [0, 1], 64, seed=1)


def test_no_copies() -> None:
    assert mixed(ROWS, [0, 1, 2], 0, seed=0) == []
