"""Prefixes batched with their text have the same hidden states as alone; weights of tokens."""

from __future__ import annotations

import pytest
import torch

from qembed.checkpoint.head import Head
from qembed.quantize.batches import plain, with_prefixes
from qembed.quantize.blocks import DecoderLayer
from qembed.quantize.checks import shape_of
from qembed.quantize.hidden import Moments, Stream
from tests.checkpoints import MakeCheckpoint

from .test_layerwise import layer_tensors

LAST = Head("last", (), True)
END = 256
ROWS = [[*range(1, 30), END], [*range(40, 52), END], [7, 8, END]]


def test_prefix_has_the_same_hidden_state_in_a_batch_and_alone(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("qwen3")
    assert shape_of(checkpoint, 64)
    table, block = checkpoint.tensor("embed_tokens.weight"), DecoderLayer(checkpoint, torch.device("cpu"))
    stream = Stream.start(table, with_prefixes(ROWS, range(3), 100, prefixes=4, last_share=0.5, seed=0))
    prefixes: list[tuple[list[int], torch.Tensor]] = []
    for number in range(2):
        block.load(layer_tensors(checkpoint, number))
        stream.advance(block)
    for batch, hidden in stream:
        for row in range(len(batch.ids)):
            end = int(batch.ends[row])
            for column in range(end + 1, batch.ids.shape[1]):
                if batch.weight[row, column] > 0:
                    tokens = [*batch.ids[row, : int(batch.positions[row, column])].tolist(), END]
                    prefixes.append((tokens, hidden[row, column]))
    assert len(prefixes) == 8
    alone = Stream.start(table, plain([tokens for tokens, _ in prefixes], range(8), tokens=1))
    for number in range(2):
        block.load(layer_tensors(checkpoint, number))
        alone.advance(block)
    expected = {tuple(batch.ids[0].tolist()): hidden[0, -1] for batch, hidden in alone}
    for tokens, hidden in prefixes:
        torch.testing.assert_close(hidden, expected[tuple(tokens)], rtol=1e-4, atol=1e-4)


def test_prefixes_do_not_change_the_vectors_of_their_texts(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("llama")
    table, block = checkpoint.tensor("embed_tokens.weight"), DecoderLayer(checkpoint, torch.device("cpu"))
    block.load(layer_tensors(checkpoint))
    vectors = []
    for batches in (plain(ROWS, range(3), 100), with_prefixes(ROWS, range(3), 100, prefixes=4, last_share=0.5, seed=0)):
        stream = Stream.start(table, batches)
        stream.advance(block)
        vectors.append(stream.vectors(checkpoint.tensor("norm.weight").float(), 1e-6, LAST))
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_last_tokens_have_the_given_share_of_the_weight(share: float) -> None:
    batches = with_prefixes(ROWS, range(3), 100, prefixes=4, last_share=share, seed=0)
    weights = torch.cat([batch.weight.flatten() for batch in batches])
    last = torch.cat([(batch.ids == END).flatten() for batch in batches])
    assert weights[weights > 0].mean().item() == pytest.approx(1)
    expected = share or int(last.sum()) / int((weights > 0).sum())
    assert (weights[last].sum() / weights.sum()).item() == pytest.approx(expected)
    assert weights[~last & (weights > 0)].unique().numel() == 1


def test_prefixes_end_with_their_own_token_if_the_tokenizer_appends_none() -> None:
    rows = [list(range(1, 20)), list(range(30, 44))]
    batch = with_prefixes(rows, range(2), 100, prefixes=3, last_share=0.5, seed=0)[0]
    assert batch.visible is None
    assert sorted(int(row.max()) for row in batch.ids) == [19, 43]
    heavy = batch.weight == batch.weight.max()
    assert heavy.sum(1).tolist() == [4, 4]
    assert all(heavy[row, batch.ends[row]] for row in range(2))


def test_moments_are_weighted_and_exclude_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = with_prefixes(ROWS, range(3), 100, prefixes=2, last_share=0.7, seed=0)
    inputs = [(batch, torch.randn(*batch.ids.shape, 6, generator=generator)) for batch in batches]
    moments = Moments.of((batch, x, x[..., :2] * 3) for batch, x in inputs)
    expected = sum(
        batch.weight[row, column] * torch.outer(x[row, column], x[row, column])
        for batch, x in inputs
        for row in range(x.shape[0])
        for column in range(x.shape[1])
    )
    torch.testing.assert_close(moments.gram, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.cross, 3 * expected[:2], rtol=1e-4, atol=1e-4)


def test_a_token_counts_relative_to_the_size_of_its_residual_stream() -> None:
    batch = with_prefixes(ROWS, range(3), 100, prefixes=2, last_share=0.5, seed=0)[0]
    residual = torch.ones(*batch.ids.shape, 8)
    residual[:, 0] = 1000.0
    relative = batch.relative_to(residual)
    torch.testing.assert_close(relative.weight[:, 1:], batch.weight[:, 1:])
    torch.testing.assert_close(relative.weight[:, 0], batch.weight[:, 0] * 1e-6)
    assert batch.relative_to(torch.zeros_like(residual)).weight.isfinite().all()
