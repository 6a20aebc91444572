"""Splitting an engine step of several texts into pieces."""

from __future__ import annotations

import torch

from qembed.serve.vllm_plugin.pieces import pieces


def test_a_step_that_fits_is_one_piece() -> None:
    (piece,) = pieces(torch.tensor([0, 3, 5]), torch.tensor([3, 2]), 8)
    assert (piece.begin, piece.end, piece.requests) == (0, 5, (0, 2))
    assert piece.query_start_loc.tolist() == [0, 3, 5]
    assert piece.seq_lens.tolist() == [3, 2]


def test_a_text_continues_in_the_next_piece_with_its_earlier_tokens_as_context() -> None:
    """Texts of 2, 7 and 3 tokens in pieces of 4: ab|cdef ghi|jkl → ab cd · efgh · i jkl."""
    first, second, third = pieces(torch.tensor([0, 2, 9, 12]), torch.tensor([2, 7, 3]), 4)
    assert [(piece.begin, piece.end, piece.requests) for piece in (first, second, third)] == [
        (0, 4, (0, 2)),
        (4, 8, (1, 2)),
        (8, 12, (1, 3)),
    ]
    assert [piece.query_start_loc.tolist() for piece in (first, second, third)] == [[0, 2, 4], [0, 4], [0, 1, 4]]
    assert [piece.seq_lens.tolist() for piece in (first, second, third)] == [[2, 2], [6], [7, 3]]


def test_tokens_of_earlier_steps_count_as_context() -> None:
    first, second = pieces(torch.tensor([0, 6]), torch.tensor([16]), 4)
    assert (first.seq_lens.tolist(), second.seq_lens.tolist()) == ([14], [16])
