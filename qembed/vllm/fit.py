"""Inverse of plan.py: the largest context and batch within a byte budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qembed.errors import BadInput
from qembed.sizes import gib
from qembed.vllm.plan import Plan

MAX_SEQS = 256
MIN_BATCHED_TOKENS = 512
MIN_MODEL_LEN = 64


@dataclass(frozen=True)
class Sizes:
    """The sizes of a plan, named as vLLM's options: lengths in tokens, and a number of sequences."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


MakePlan = Callable[[Sizes], Plan]


def fit(memory: int, start: Sizes, fixed: set[str], limit: int, make: MakePlan) -> Sizes:
    """The longest context, and then the most sequences, whose plan takes at most `memory` bytes.

    Fields of `Sizes` named in `fixed` stay as in `start`. The context grows up to `limit`, the model's own. It comes first
    because a text that is too long is refused, whereas one that finds no place only waits. If no context fits with
    `start.max_num_seqs`, fewer sequences are tried, and then fewer batched tokens.

    Raises:
        BadInput: not even the smallest sizes fit; the message has their plan.
    """
    token_choices = sorted({start.max_num_batched_tokens, MIN_BATCHED_TOKENS}, reverse=True)
    seq_choices = sorted({start.max_num_seqs, max(1, start.max_num_seqs // 4), 1}, reverse=True)
    if "max_num_batched_tokens" in fixed:
        token_choices = [start.max_num_batched_tokens]
    if "max_num_seqs" in fixed:
        seq_choices = [start.max_num_seqs]
    smallest: Sizes | None = None
    for tokens in token_choices:
        for seqs in seq_choices:
            smallest = Sizes(
                start.max_model_len if "max_model_len" in fixed else min(MIN_MODEL_LEN, limit), min(seqs, tokens), tokens
            )
            if make(smallest).total > memory:
                continue
            length = smallest.max_model_len
            if "max_model_len" not in fixed:
                length = _largest(smallest.max_model_len, limit, memory, make, partial(_with_length, smallest))
            sizes = _with_length(smallest, length)
            if "max_num_seqs" in fixed:
                return sizes
            max_seqs = max(sizes.max_num_seqs, min(MAX_SEQS, tokens))
            seqs = _largest(sizes.max_num_seqs, max_seqs, memory, make, partial(_with_seqs, sizes))
            return _with_seqs(sizes, seqs)
    assert smallest is not None
    raise BadInput(f"--memory {gib(memory)} is too little: {_needs(make(smallest), smallest)}")


def _needs(plan: Plan, sizes: Sizes) -> str:
    return (
        f"{sizes.max_num_seqs} sequence{'s' if sizes.max_num_seqs > 1 else ''} of {sizes.max_model_len} tokens need "
        f"{gib(plan.total)}: weights {gib(plan.weights)}, keys and values {gib(plan.kv_cache)}, "
        f"activations {gib(plan.activations)}, "
        f"{'CUDA context and graphs' if plan.graphs else 'processes and libraries'} {gib(plan.runtime + plan.graphs)}"
    )


def _with_length(sizes: Sizes, length: int) -> Sizes:
    return Sizes(length, sizes.max_num_seqs, sizes.max_num_batched_tokens)


def _with_seqs(sizes: Sizes, seqs: int) -> Sizes:
    return Sizes(sizes.max_model_len, seqs, sizes.max_num_batched_tokens)


def _largest(low: int, high: int, memory: int, make: MakePlan, at: Callable[[int], Sizes]) -> int:
    """The largest number from `low` to `high` whose plan fits. That of `low` is known to fit."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if make(at(middle)).total <= memory else (low, middle - 1)
    return low
