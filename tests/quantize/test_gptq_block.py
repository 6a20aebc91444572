"""The compiled inner loop of GPTQ beside the same loop in torch."""

from __future__ import annotations

import pytest
import torch

from qembed.quantize import awq, gptq_block, rounding

needs_compiled = pytest.mark.skipif(gptq_block._compiled() is None, reason="not compiled here (no C++ compiler)")


def _inputs(outputs: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and a Gram matrix [K, K] of correlated inputs, a few of which are large."""
    generator = torch.Generator().manual_seed(outputs)
    x = torch.randn(2 * channels, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
    x[:, ::17] *= 12
    return torch.randn(outputs, channels, generator=generator) * 0.02, x.T @ x


@needs_compiled
@pytest.mark.parametrize("outputs", [1, 33, 160])
def test_compiled_loop_gives_the_same_bits_as_torch(outputs: int) -> None:
    weight, gram = _inputs(outputs, 128)
    inverse, grid = rounding.Inverse.of(gram), awq.range_grid(weight, 32)
    arguments = (inverse.upper, grid.scale.T.contiguous(), grid.zero_point.T.contiguous(), inverse.order // 32)
    values = weight.T[inverse.order]
    errors, levels = values.clone(), torch.empty_like(values)
    gptq_block.round_in_torch(errors, levels, *arguments)
    compiled_levels = torch.empty_like(values)
    gptq_block.round_block(values, compiled_levels, *arguments)
    assert torch.equal(compiled_levels, levels)
    assert torch.equal(values, errors)
    assert levels.unique().numel() > 8


@needs_compiled
def test_gptq_gives_the_same_levels_without_the_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = _inputs(70, 320)
    inverse, grid = rounding.Inverse.of(gram), awq.range_grid(weight, 64)
    compiled = rounding.gptq(weight, inverse, grid)
    monkeypatch.setattr(gptq_block, "_compiled", lambda: None)
    assert torch.equal(rounding.gptq(weight, inverse, grid), compiled)


def test_a_missing_library_leaves_the_loop_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_block, "LIBRARY", "qembed.quantize._absent")
    assert gptq_block._compiled.__wrapped__() is None
