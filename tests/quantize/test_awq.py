"""The searches for scales and clipping, and the grid, on random weights and inputs."""

from __future__ import annotations

import pytest
import torch

from qembed.quantize import awq, rounding


def weight_and_gram(outputs: int = 48, inputs: int = 128, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight, and the Gram matrix of inputs that are correlated and have a few large channels, as in a real model."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.1
    x = torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator) * 0.1
    x[:, ::17] *= 12
    return weight, x.T @ x


def error(weight: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> float:
    return awq.output_error(rounded - weight, gram).item()


def test_output_error_is_the_squared_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, difference = torch.randn(50, 16, generator=generator), torch.randn(8, 16, generator=generator)
    assert awq.output_error(difference, x.T @ x).item() == pytest.approx((x @ difference.T).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rtn_error_is_at_most_half_a_step(group_size: int) -> None:
    weight, _ = weight_and_gram()
    grid = awq.range_grid(weight, group_size)
    steps = grid.scale.repeat_interleave(group_size, dim=1)
    assert ((grid.rtn(weight) - weight).abs() <= steps * 1.01).all()
    assert ((grid.rtn(weight) - weight).abs() <= steps * 0.501).float().mean() > 0.98
    assert torch.equal(grid.scale, grid.scale.half().float())


def test_zero_weights_stay_zero() -> None:
    weight, _ = weight_and_gram()
    weight[:, 5] = 0
    weight[3] = 0
    rounded = awq.range_grid(weight, 32).rtn(weight)
    assert (rounded[:, 5] == 0).all()
    assert (rounded[3] == 0).all()


def test_scales_clipping_and_gptq_each_have_less_error_than_rtn() -> None:
    weight, gram = weight_and_gram()
    rtn_error = error(weight, awq.range_grid(weight, 64).rtn(weight), gram)
    scales = awq.search_scales([weight], gram, 64)
    scaled = awq.range_grid(weight * scales, 64).rtn(weight * scales) / scales
    assert error(weight, scaled, gram) < 0.9 * rtn_error
    grid = awq.search_clip(weight, gram, 64)
    assert error(weight, grid.rtn(weight), gram) < rtn_error
    gptq = grid.dequantize(rounding.gptq(weight, rounding.Inverse.of(gram), grid))
    assert error(weight, gptq, gram) < 0.6 * error(weight, grid.rtn(weight), gram)


def test_scale_search_considers_all_weights_that_share_the_input() -> None:
    weight, gram = weight_and_gram()
    weights = [weight, weight.flip(1) * 3]
    scales_of_both = awq.search_scales(weights, gram, 64)

    def total_error(scales: torch.Tensor) -> float:
        return sum(error(w, awq.range_grid(w * scales, 64).rtn(w * scales) / scales, gram) for w in weights)

    assert total_error(scales_of_both) <= total_error(awq.search_scales(weights[:1], gram, 64)) * 1.001
    assert total_error(scales_of_both) < total_error(torch.ones(128))


def test_channels_with_the_same_source_share_a_scale() -> None:
    weight, gram = weight_and_gram()
    sources = torch.arange(64).repeat(2)
    scales = awq.search_scales([weight], gram, 64, sources)
    assert torch.equal(scales[:64], scales[64:])
    assert scales.unique().numel() > 10


def test_gram_matrix_of_few_or_no_tokens_gives_valid_scales_and_levels() -> None:
    weight, _ = weight_and_gram()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    for gram in (x.T @ x, torch.zeros(128, 128)):
        scales = awq.search_scales([weight], gram, 64)
        grid = awq.search_clip(weight * scales, gram, 64)
        levels = rounding.gptq(weight * scales, rounding.Inverse.of(gram), grid)
        assert torch.isfinite(scales).all()
        assert ((levels >= 0) & (levels <= 15)).all()


def test_scales_searched_for_gptq_lower_its_error() -> None:
    weight, gram = weight_and_gram()
    weight[:, 3] *= 20
    scales = awq.search_scales([weight], gram, 64, remaining_variance=rounding.Inverse.of(gram).remaining_variance())
    assert not torch.equal(scales, torch.ones(128))
    errors = []
    for divisors in (torch.ones(128), scales):
        scaled, scaled_gram = weight * divisors, gram / (divisors[:, None] * divisors)
        grid = awq.range_grid(scaled, 64)
        levels = rounding.gptq(scaled, rounding.Inverse.of(scaled_gram), grid)
        errors.append(error(scaled, grid.dequantize(levels), scaled_gram))
    assert errors[1] < 0.9 * errors[0]


def test_stacked_grids_split_into_the_same_grids() -> None:
    weight, _ = weight_and_gram()
    grids = [awq.range_grid(weight[:16], 64), awq.range_grid(weight[16:] * 3, 64)]
    for split, grid in zip(awq.Grid.stack(grids).split([16, 32]), grids, strict=True):
        assert torch.equal(split.scale, grid.scale)
        assert torch.equal(split.zero_point, grid.zero_point)
