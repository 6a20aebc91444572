"""The other way round: how long a context and how many sequences go into so many bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qembed.errors import BadInput
from qembed.sizes import gib
from qembed.vllm.plan import Plan

MOST_SEQS = 256
FEWEST_TOKENS = 512
SHORTEST = 64


@dataclass(frozen=True)
class Sizes:
    """What a plan is made for: a length and a number of tokens in tokens, and a number of sequences."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


MakePlan = Callable[[Sizes], Plan]


def fit(memory: int, asked: Sizes, fixed: set[str], limit: int, make: MakePlan) -> Sizes:
    """The longest context, and then the most sequences, whose plan is at most `memory` bytes.

    What stands in `fixed` (names of `Sizes`) stays as `asked`; the context goes up to `limit`, the model's own. The context
    comes first because a text that is too long is refused, whereas one that finds no place only waits: with too little memory
    for `asked.max_num_seqs` at any length, fewer are taken, and with too little for that, fewer tokens at once.

    Raises:
        BadInput: not even the smallest fits; the message has the plan of that.
    """
    steps = sorted({asked.max_num_batched_tokens, FEWEST_TOKENS}, reverse=True)
    few = sorted({asked.max_num_seqs, max(1, asked.max_num_seqs // 4), 1}, reverse=True)
    if "max_num_batched_tokens" in fixed:
        steps = [asked.max_num_batched_tokens]
    if "max_num_seqs" in fixed:
        few = [asked.max_num_seqs]
    smallest: Sizes | None = None
    for tokens in steps:
        for seqs in few:
            smallest = Sizes(
                asked.max_model_len if "max_model_len" in fixed else min(SHORTEST, limit), min(seqs, tokens), tokens
            )
            if make(smallest).total > memory:
                continue
            length = smallest.max_model_len
            if "max_model_len" not in fixed:
                length = _most(smallest.max_model_len, limit, memory, make, partial(_with_length, smallest))
            found = _with_length(smallest, length)
            if "max_num_seqs" in fixed:
                return found
            most = min(MOST_SEQS, tokens)
            seqs = _most(found.max_num_seqs, max(found.max_num_seqs, most), memory, make, partial(_with_seqs, found))
            return _with_seqs(found, seqs)
    assert smallest is not None
    raise BadInput(f"--memory {gib(memory)} is too little: {_needs(make(smallest), smallest)}")


def _needs(plan: Plan, sizes: Sizes) -> str:
    return (
        f"{sizes.max_num_seqs} sequence{'s' if sizes.max_num_seqs > 1 else ''} of {sizes.max_model_len} tokens need "
        f"{gib(plan.total)}: weights {gib(plan.weights)}, cache {gib(plan.kv_cache)}, activations {gib(plan.activations)}, "
        f"{'CUDA context and graphs' if plan.graphs else 'processes and libraries'} {gib(plan.runtime + plan.graphs)}"
    )


def _with_length(sizes: Sizes, length: int) -> Sizes:
    return Sizes(length, sizes.max_num_seqs, sizes.max_num_batched_tokens)


def _with_seqs(sizes: Sizes, seqs: int) -> Sizes:
    return Sizes(sizes.max_model_len, seqs, sizes.max_num_batched_tokens)


def _most(low: int, high: int, memory: int, make: MakePlan, at: Callable[[int], Sizes]) -> int:
    """The greatest number from `low`, which fits, to `high` that fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if make(at(middle)).total <= memory else (low, middle - 1)
    return low
