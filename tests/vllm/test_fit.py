"""`--memory`: the longest context that fits, then the most sequences."""

from __future__ import annotations

import pytest

from qembed.errors import BadInput
from qembed.vllm.fit import Sizes, fit
from qembed.vllm.plan import Plan

WEIGHTS = 1000


def make(sizes: Sizes) -> Plan:
    """One byte per token of context, ten per sequence, one per batched token."""
    cache = sizes.max_model_len + 10 * sizes.max_num_seqs
    return Plan(WEIGHTS, 0, 0, cache, cache, activations=sizes.max_num_batched_tokens)


START = Sizes(8192, 32, 2048)


@pytest.mark.parametrize("memory", [1600, 3000, 4000, 5000, 10_000, 50_000])
def test_the_context_is_the_longest_that_fits(memory: int) -> None:
    sizes = fit(memory, START, set(), 32_768, make)
    assert make(sizes).total <= memory
    longer = Sizes(sizes.max_model_len + 1, sizes.max_num_seqs, sizes.max_num_batched_tokens)
    assert sizes.max_model_len == 32_768 or make(longer).total > memory


def test_sequences_get_the_memory_that_the_context_leaves() -> None:
    sizes = fit(1000 + 2048 + 32_768 + 400, START, set(), 32_768, make)
    assert sizes == Sizes(32_768, 40, 2048)


def test_little_memory_means_fewer_sequences_then_fewer_batched_tokens() -> None:
    assert fit(1000 + 2048 + 64 + 80, START, set(), 32_768, make) == Sizes(64, 8, 2048)
    assert fit(1000 + 512 + 64 + 10, START, set(), 32_768, make) == Sizes(64, 1, 512)


def test_fixed_sizes_stay() -> None:
    assert fit(10_100, START, {"max_model_len", "max_num_seqs"}, 32_768, make) == Sizes(8192, 32, 512)
    with pytest.raises(BadInput, match="too little"):
        fit(9_000, START, {"max_model_len", "max_num_seqs", "max_num_batched_tokens"}, 32_768, make)


def test_too_little_memory_is_refused_with_the_smallest_plan() -> None:
    with pytest.raises(BadInput, match=r"^--memory 0 MiB is too little: 1 sequence of 64 tokens need 0 MiB: weights"):
        fit(1500, START, set(), 32_768, make)
