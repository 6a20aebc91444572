"""`--memory`: the longest context, then the most sequences."""

from __future__ import annotations

import pytest

from qembed.errors import BadInput
from qembed.vllm.fit import Sizes, fit
from qembed.vllm.plan import Plan

WEIGHTS = 1000


def make(sizes: Sizes) -> Plan:
    """A byte a token of context, ten a sequence, one a token at once."""
    cache = sizes.max_model_len + 10 * sizes.max_num_seqs
    return Plan(WEIGHTS, 0, 0, cache, cache, activations=sizes.max_num_batched_tokens)


ASKED = Sizes(8192, 32, 2048)


@pytest.mark.parametrize("memory", [1600, 3000, 4000, 5000, 10_000, 50_000])
def test_what_is_chosen_fits_and_one_more_token_would_not(memory: int) -> None:
    found = fit(memory, ASKED, set(), 32_768, make)
    assert make(found).total <= memory
    longer = Sizes(found.max_model_len + 1, found.max_num_seqs, found.max_num_batched_tokens)
    assert found.max_model_len == 32_768 or make(longer).total > memory


def test_the_context_comes_before_sequences_and_sequences_take_what_is_left() -> None:
    found = fit(1000 + 2048 + 32_768 + 400, ASKED, set(), 32_768, make)
    assert found == Sizes(32_768, 40, 2048)


def test_with_little_memory_there_are_fewer_sequences_and_then_fewer_tokens_at_once() -> None:
    assert fit(1000 + 2048 + 64 + 80, ASKED, set(), 32_768, make) == Sizes(64, 8, 2048)
    assert fit(1000 + 512 + 64 + 10, ASKED, set(), 32_768, make) == Sizes(64, 1, 512)


def test_what_was_given_stays() -> None:
    assert fit(10_100, ASKED, {"max_model_len", "max_num_seqs"}, 32_768, make) == Sizes(8192, 32, 512)
    with pytest.raises(BadInput, match="too little"):
        fit(9_000, ASKED, {"max_model_len", "max_num_seqs", "max_num_batched_tokens"}, 32_768, make)


def test_too_little_is_a_clear_no_with_what_the_least_would_take() -> None:
    with pytest.raises(BadInput, match=r"^--memory 0 MiB is too little: 1 sequence of 64 tokens need 0 MiB: weights"):
        fit(1500, ASKED, set(), 32_768, make)
