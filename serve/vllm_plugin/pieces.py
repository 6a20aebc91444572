"""Computes a decoder layer in pieces of a step's tokens, so that activations do not grow with the longest text.

Only the residual stream, and the keys and values of one layer, then span all tokens. A piece's queries attend to the keys and
values of its own and earlier pieces, as in chunked prefill; but the next piece follows in the same layer, not after the last
layer. (PrefillOnly, https://arxiv.org/abs/2505.07203, section 4, does so for the linear layers only.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Forward = Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class Piece:
    """The tokens `begin` to `end` of a step, as the requests of a step of their own.

    Attributes:
        requests: indices in the step of the first request and after the last.
        query_start_loc: [requests + 1] int32, where each request's tokens begin in the piece.
        seq_lens: [requests] int32, the tokens of each request up to the end of the piece, earlier pieces included.
    """

    begin: int
    end: int
    requests: tuple[int, int]
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor


def pieces(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, size: int) -> Iterator[Piece]:
    """Split a step into pieces of at most `size` tokens.

    Args:
        query_start_loc: [n + 1], where each request's tokens begin.
        seq_lens: [n], the length of each request, including tokens before this step.
        size: tokens in a piece.
    """
    begins, ends = query_start_loc[:-1], query_start_loc[1:]
    total = int(query_start_loc[-1])
    for begin in range(0, total, size):
        end = min(begin + size, total)
        touched = ((ends > begin) & (begins < end)).nonzero().flatten()
        first, last = int(touched[0]), int(touched[-1]) + 1
        yield Piece(
            begin,
            end,
            (first, last),
            query_start_loc[first : last + 1].clamp(begin, end) - begin,
            seq_lens[first:last] - (ends[first:last] - end).clamp(min=0),
        )


def compute_in_pieces(runner: Any, size: int) -> None:
    """Let the model of vLLM's `runner` compute steps of more than `size` tokens in pieces.

    A model compiled by vLLM is bypassed for such a step: pieces are large enough to keep a GPU busy without it.
    """
    from vllm.forward_context import get_forward_context

    model = runner.get_model()
    forward = model.forward
    layers = [layer for layer in model.model.layers if hasattr(layer, "self_attn")]  # others belong to another worker

    def compute(input_ids: torch.Tensor | None, positions: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if positions.shape[-1] <= size:
            return forward(input_ids, positions, *arguments, **options)
        context = get_forward_context()
        context.skip_compiled = True
        with _in_pieces(layers, list(_contexts(context, runner, size, positions.shape[-1]))):
            return forward(input_ids, positions, *arguments, **options)

    model.forward = compute


@contextmanager
def _in_pieces(layers: Sequence[Any], contexts: Sequence[tuple[slice, Any]]) -> Iterator[None]:
    """Let `layers` compute one slice of tokens after the other, each with its forward context, inside the block."""
    from vllm.forward_context import override_forward_context

    def by_pieces(forward: Forward) -> Forward:
        def compute(
            positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            # The first layer has no residual yet, and its own may be a view of hidden_states: so it is copied first.
            streams = hidden_states.new_empty(hidden_states.shape) if residual is None else residual
            for rows, context in contexts:
                with override_forward_context(context):
                    output, stream = forward(
                        positions[..., rows], hidden_states[rows], None if residual is None else residual[rows]
                    )
                _put(stream, streams[rows])
                _put(output, hidden_states[rows])
            return hidden_states, streams

        return compute

    originals = [layer.forward for layer in layers]
    for layer, forward in zip(layers, originals, strict=True):
        layer.forward = by_pieces(forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, originals, strict=True):
            layer.forward = forward


def _put(values: torch.Tensor, place: torch.Tensor) -> None:
    """Copy `values` to `place`, unless they were computed there."""
    if values.data_ptr() != place.data_ptr():
        place.copy_(values)


def _contexts(context: Any, runner: Any, size: int, total: int) -> Iterator[tuple[slice, Any]]:
    """The tokens of each piece of a step of `total` tokens, and vLLM's forward context for them."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    if not isinstance(context.attn_metadata, dict):  # vLLM measures memory: nothing attends
        for begin in range(0, total, size):
            yield slice(begin, min(begin + size, total)), context
        return
    metadata = next(iter(context.attn_metadata.values()))
    slots = next(iter(context.slot_mapping.values()))
    builder = runner.attn_groups[0][0].get_metadata_builder()
    for piece in pieces(metadata.query_start_loc, metadata.seq_lens, size):
        rows = slice(piece.begin, piece.end)
        common = CommonAttentionMetadata(
            query_start_loc=piece.query_start_loc,
            query_start_loc_cpu=piece.query_start_loc.cpu(),
            seq_lens=piece.seq_lens,
            num_reqs=len(piece.seq_lens),
            num_actual_tokens=piece.end - piece.begin,
            max_query_len=int(piece.query_start_loc.diff().max()),
            max_seq_len=int(piece.seq_lens.max()),
            block_table_tensor=metadata.block_table[slice(*piece.requests)],
            slot_mapping=slots[rows],
        )
        # All pieces are planned before the first is computed. A full build would let FlashAttention 3 write each piece's
        # schedule over the one before, into its buffer for CUDA graphs.
        planned = builder.build(0, common, fast_build=True)
        yield (
            rows,
            replace(
                context,
                attn_metadata=dict.fromkeys(context.attn_metadata, planned),
                slot_mapping=dict.fromkeys(context.slot_mapping, common.slot_mapping),
            ),
        )
