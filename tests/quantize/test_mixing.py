"""Mixed copies: half of the tokens from the text, half from all texts that may be used."""

from __future__ import annotations

from itertools import pairwise

from qembed.quantize.mixing import mixed_copies

ROWS = [[*range(1, 101), 999], [*range(200, 220), 999], [7, 999], [*range(500, 600), 999]]


def test_copy_is_half_its_text_and_half_random_tokens() -> None:
    copy, short, shortest = mixed_copies(ROWS, [0, 1, 2], 64, seed=0)
    assert [len(copy), len(short), len(shortest)] == [64, 21, 2]
    assert {copy[-1], short[-1], shortest[-1]} == {999}
    in_order = sum(after - before == 1 for before, after in pairwise(copy))
    assert 5 < in_order < 35  # of 63 pairs, a quarter if each token is kept with probability 1/2
    assert any(token >= 200 for token in copy[:-1])


def test_copies_contain_no_tokens_of_other_rows() -> None:
    copies = mixed_copies(ROWS, [0, 1, 2], 64, seed=1)
    assert not {token for copy in copies for token in copy} & set(range(500, 600))


def test_copies_depend_only_on_the_seed() -> None:
    assert (
        mixed_copies(ROWS, [0, 1], 64, seed=0)
        == mixed_copies(ROWS, [0, 1], 64, seed=0)
        != mixed_copies(ROWS, [0, 1], 64, seed=1)
    )


def test_zero_tokens_give_no_copies() -> None:
    assert mixed_copies(ROWS, [0, 1, 2], 0, seed=0) == []
