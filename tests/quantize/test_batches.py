"""Prefixes that ride along with their text give the vectors that they have by themselves."""

from __future__ import annotations

import pytest
import torch

from qembed.quantize.batches import plain, with_prefixes
from qembed.quantize.blocks import DecoderLayer
from qembed.quantize.checks import shape_of
from qembed.quantize.hidden import Moments, Stream

from .conftest import MakeCheckpoint
from .test_stream import layer_tensors

END = 256
ROWS = [[*range(1, 30), END], [*range(40, 52), END], [7, 8, END]]


def test_a_prefix_in_a_batch_has_the_hidden_state_that_it_has_alone(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("qwen3")
    assert shape_of(checkpoint, 64)
    table, block = checkpoint.tensor("embed_tokens.weight"), DecoderLayer(checkpoint, torch.device("cpu"))
    made = with_prefixes(ROWS, range(3), 100, prefixes=4, last_share=0.5, seed=0)
    together = Stream.start(table, made)
    prefixes: list[tuple[list[int], torch.Tensor]] = []
    for number in range(2):
        block.load(layer_tensors(checkpoint, number))
        together.advance(block)
    for batch, hidden in together:
        for row in range(len(batch.ids)):
            end = int(batch.ends[row])
            for at in range(end + 1, batch.ids.shape[1]):
                if batch.weight[row, at] > 0:
                    tokens = [*batch.ids[row, : int(batch.positions[row, at])].tolist(), END]
                    prefixes.append((tokens, hidden[row, at]))
    assert len(prefixes) == 8
    alone = Stream.start(table, plain([tokens for tokens, _ in prefixes], range(8), tokens=1))
    for number in range(2):
        block.load(layer_tensors(checkpoint, number))
        alone.advance(block)
    found = {tuple(batch.ids[0].tolist()): hidden[0, -1] for batch, hidden in alone}
    for tokens, hidden in prefixes:
        torch.testing.assert_close(hidden, found[tuple(tokens)], rtol=1e-4, atol=1e-4)


def test_texts_are_not_moved_by_the_prefixes_beside_them(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("llama")
    table, block = checkpoint.tensor("embed_tokens.weight"), DecoderLayer(checkpoint, torch.device("cpu"))
    block.load(layer_tensors(checkpoint))
    vectors = []
    for made in (plain(ROWS, range(3), 100), with_prefixes(ROWS, range(3), 100, prefixes=4, last_share=0.5, seed=0)):
        flow = Stream.start(table, made)
        flow.advance(block)
        vectors.append(flow.vectors(checkpoint.tensor("norm.weight").float(), 1e-6))
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_last_tokens_have_their_share(share: float) -> None:
    made = with_prefixes(ROWS, range(3), 100, prefixes=4, last_share=share, seed=0)
    weights = torch.cat([batch.weight.flatten() for batch in made])
    last = torch.cat([(batch.ids == END).flatten() for batch in made])
    assert weights[weights > 0].mean().item() == pytest.approx(1)
    expected = share or int(last.sum()) / int((weights > 0).sum())
    assert (weights[last].sum() / weights.sum()).item() == pytest.approx(expected)
    assert weights[~last & (weights > 0)].unique().numel() == 1


def test_without_a_token_that_is_always_appended_the_texts_own_tokens_end_the_prefixes() -> None:
    rows = [list(range(1, 20)), list(range(30, 44))]
    batch = with_prefixes(rows, range(2), 100, prefixes=3, last_share=0.5, seed=0)[0]
    assert batch.visible is None
    assert sorted(int(row.max()) for row in batch.ids) == [19, 43]
    heavy = batch.weight == batch.weight.max()
    assert heavy.sum(1).tolist() == [4, 4]
    assert all(heavy[row, batch.ends[row]] for row in range(2))


def test_moments_weigh_tokens_and_leave_padding_out() -> None:
    generator = torch.Generator().manual_seed(0)
    made = with_prefixes(ROWS, range(3), 100, prefixes=2, last_share=0.7, seed=0)
    found = [(batch, torch.randn(*batch.ids.shape, 6, generator=generator)) for batch in made]
    moments = Moments.of((batch, x, x[..., :2] * 3) for batch, x in found)
    expected = sum(
        batch.weight[row, at] * torch.outer(x[row, at], x[row, at])
        for batch, x in found
        for row in range(x.shape[0])
        for at in range(x.shape[1])
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
