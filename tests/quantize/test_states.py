"""States in 16 bits are those that were stored, up to rounding, whatever their size."""

from __future__ import annotations

import torch

from qembed.quantize.batches import plain
from qembed.quantize.states import StoredStates

BATCHES = plain([[0] * 9, [0] * 9, [0] * 20], range(3), tokens=18)


def states(size: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*batch.ids.shape, 64, generator=generator) * size for batch in BATCHES]


def test_a_residual_stream_is_rounded_relative_to_each_token() -> None:
    for size in (1e-36, 1e-30, 1.0, 1e6, 1e30):
        stored, original = StoredStates(BATCHES, 64), states(size)
        original[0][0, 0, 5] = 1000 * size  # a massive activation
        original[1][0, 3] = 0
        for number, tensor in enumerate(original):
            stored[number] = tensor
        assert len(stored) == len(BATCHES) == 2
        for read, tensor in zip(stored, original, strict=True):
            assert read.dtype == torch.float32
            assert ((read - tensor).abs() <= 2.0**-11 * tensor.abs() + 2.0**-38 * tensor.abs().amax(-1, keepdim=True)).all()


def test_inputs_of_linears_are_in_bfloat16_and_keep_powers_of_two() -> None:
    stored, divided = StoredStates(BATCHES, 64, inputs=True), StoredStates(BATCHES, 64, inputs=True)
    powers = 2.0 ** torch.arange(-8, 56)
    for number, tensor in enumerate(states(3.0)):
        stored[number], divided[number] = tensor, tensor / powers
    for tensor, whole, part in zip(states(3.0), stored, divided, strict=True):
        assert torch.equal(whole, tensor.bfloat16().float())
        assert torch.equal(part * powers, whole)
