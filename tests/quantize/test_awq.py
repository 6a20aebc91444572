from __future__ import annotations

import pytest
import torch

from qembed.quantize import awq, rounding


def weight_and_gram(outputs: int = 48, inputs: int = 128, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """A random layer, and inputs that are correlated and have a few large channels, as in a real model."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.1
    x = torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator) * 0.1
    x[:, ::17] *= 12
    return weight, x.T @ x


def lost(weight: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor) -> float:
    return awq.output_error(changed - weight, gram).item()


def test_output_error_is_the_squared_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, difference = torch.randn(50, 16, generator=generator), torch.randn(8, 16, generator=generator)
    assert awq.output_error(difference, x.T @ x).item() == pytest.approx((x @ difference.T).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_nearest_rounding_is_off_by_half_a_step_at_most(group_size: int) -> None:
    weight, _ = weight_and_gram()
    grid = awq.range_grid(weight, group_size)
    steps = grid.scale.repeat_interleave(group_size, dim=1)
    assert ((grid.nearest(weight) - weight).abs() <= steps * 1.01).all()
    assert ((grid.nearest(weight) - weight).abs() <= steps * 0.501).float().mean() > 0.98
    assert torch.equal(grid.scale, grid.scale.half().float())


def test_zero_stays_zero() -> None:
    weight, _ = weight_and_gram()
    weight[:, 5] = 0
    weight[3] = 0
    rounded = awq.range_grid(weight, 32).nearest(weight)
    assert (rounded[:, 5] == 0).all()
    assert (rounded[3] == 0).all()


def test_scales_and_clipping_and_compensation_each_cost_less_than_plain_rounding() -> None:
    weight, gram = weight_and_gram()
    plain = lost(weight, awq.range_grid(weight, 64).nearest(weight), gram)
    scales = awq.search_scales([weight], gram, 64)
    scaled = awq.range_grid(weight * scales, 64).nearest(weight * scales) / scales
    assert lost(weight, scaled, gram) < 0.9 * plain
    grid = awq.search_clip(weight, gram, 64)
    assert lost(weight, grid.nearest(weight), gram) < plain
    compensated = grid.dequantize(rounding.gptq(weight, rounding.Inverse.of(gram), grid))
    assert lost(weight, compensated, gram) < 0.6 * lost(weight, grid.nearest(weight), gram)


def test_search_considers_all_matrices_that_share_the_input() -> None:
    weight, gram = weight_and_gram()
    others = [weight, weight.flip(1) * 3]
    together = awq.search_scales(others, gram, 64)

    def total(scales: torch.Tensor) -> float:
        return sum(lost(w, awq.range_grid(w * scales, 64).nearest(w * scales) / scales, gram) for w in others)

    assert total(together) <= total(awq.search_scales(others[:1], gram, 64)) * 1.001
    assert total(together) < total(torch.ones(128))


def test_channels_fed_by_one_output_share_a_scale() -> None:
    weight, gram = weight_and_gram()
    fed_by = torch.arange(64).repeat(2)
    scales = awq.search_scales([weight], gram, 64, fed_by)
    assert torch.equal(scales[:64], scales[64:])
    assert scales.unique().numel() > 10


def test_compensated_levels_are_levels_and_equal_nearest_when_inputs_are_uncorrelated() -> None:
    weight, gram = weight_and_gram()
    grid = awq.range_grid(weight, 64)
    levels = rounding.gptq(weight, rounding.Inverse.of(gram), grid)
    assert torch.equal(levels, levels.round().clamp(0, 15))
    alone = rounding.gptq(weight, rounding.Inverse.of(torch.eye(128)), grid)
    assert torch.equal(alone, grid.quantize(weight))


def test_inverse_factor_is_that_of_the_damped_inverse() -> None:
    _, gram = weight_and_gram()
    upper = rounding.inverse_factor(gram, 0.01, torch.arange(128)).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(128)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(128).double(), atol=1e-3, rtol=0)
    assert torch.equal(upper, upper.triu())


def test_the_inverse_of_a_triangle_is_that_of_its_halves() -> None:
    x = torch.randn(1500, 700, generator=torch.Generator().manual_seed(2))
    gram = x.T @ x
    upper = rounding.inverse_factor(gram, 0.01, torch.arange(700)).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(700)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(upper, expected, rtol=1e-5, atol=1e-8)


def test_a_gram_matrix_of_few_tokens_or_none_still_gives_levels() -> None:
    weight, _ = weight_and_gram()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    for gram in (x.T @ x, torch.zeros(128, 128)):
        scales = awq.search_scales([weight], gram, 64)
        grid = awq.search_clip(weight * scales, gram, 64)
        levels = rounding.gptq(weight * scales, rounding.Inverse.of(gram), grid)
        assert torch.isfinite(scales).all()
        assert ((levels >= 0) & (levels <= 15)).all()


def test_what_is_missing_is_solved_for_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 32, generator=generator), torch.randn(8, 32, generator=generator)
    wanted = x @ torch.randn(32, 8, generator=generator)
    found = weight + rounding.Inverse.of(x.T @ x, 1e-9).least_squares((wanted - x @ weight.T).T @ x)
    torch.testing.assert_close(found, torch.linalg.lstsq(x, wanted).solution.T, rtol=1e-3, atol=1e-3)
    assert torch.equal(rounding.Inverse.of(torch.zeros(32, 32)).least_squares(torch.zeros(8, 32)), torch.zeros(8, 32))


def test_remaining_variance_foretells_what_compensated_rounding_loses() -> None:
    weight, gram = weight_and_gram(outputs=256)
    grid = awq.range_grid(weight, 64)
    steps = grid.scale.square().sum(0).repeat_interleave(64)
    expected = (steps * rounding.Inverse.of(gram).remaining_variance()).sum().item() / 12
    damped = gram + rounding.DAMPING * gram.diagonal().mean() * torch.eye(128)
    real = lost(weight, grid.dequantize(rounding.gptq(weight, rounding.Inverse.of(gram), grid)), damped)
    assert real == pytest.approx(expected, rel=0.1)


def test_scales_for_compensated_rounding_lose_no_more_than_none_when_it_compensates() -> None:
    weight, gram = weight_and_gram()
    weight[:, 3] *= 20
    scales = awq.search_scales([weight], gram, 64, remaining=rounding.Inverse.of(gram).remaining_variance())
    assert not torch.equal(scales, torch.ones(128))
    found = []
    for chosen in (torch.ones(128), scales):
        scaled, own = weight * chosen, gram / (chosen[:, None] * chosen)
        grid = awq.range_grid(scaled, 64)
        found.append(lost(scaled, grid.dequantize(rounding.gptq(scaled, rounding.Inverse.of(own), grid)), own))
    assert found[1] < 0.9 * found[0]


def test_the_inverse_of_scaled_inputs_is_that_of_their_own_gram_matrix() -> None:
    _, gram = weight_and_gram()
    gram += 0.1 * gram.diagonal().mean() * torch.eye(128)
    scales = torch.linspace(0.5, 2, 128)
    found = rounding.Inverse.of(gram, 1e-6).scaled(scales)
    expected = rounding.inverse_factor(gram / (scales[:, None] * scales), 1e-6, found.order)
    torch.testing.assert_close(found.upper, expected, rtol=0.02, atol=0.01 * expected.abs().max().item())


def test_scales_that_suit_the_levels_lose_less_on_fresh_inputs_too() -> None:
    weight, gram = weight_and_gram(outputs=96, tokens=3000)
    generator = torch.Generator().manual_seed(0)
    torch.randn(96, 128, generator=generator)
    x = torch.randn(3000, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.1
    x[:, ::17] *= 12
    seen, fresh = x[:1500].T @ x[:1500], x[1500:].T @ x[1500:]
    torch.testing.assert_close(seen + fresh, gram, rtol=1e-3, atol=1e-1)
    grid = awq.search_clip(weight, seen, 64)
    inverse = rounding.Inverse.of(seen)
    levels = rounding.gptq(weight, inverse, grid)
    refitted = rounding.refitted(weight, levels, grid, seen)
    assert torch.equal(refitted.scale, refitted.scale.half().float())
    assert (refitted.scale > 0).all()
    assert torch.equal(refitted.zero_point, grid.zero_point)
    before = lost(weight, grid.dequantize(levels), fresh)
    assert lost(weight, refitted.dequantize(levels), fresh) < 0.98 * before
    last, chosen = rounding.rounded(weight, seen, inverse, grid)
    assert torch.equal(last, last.round().clamp(0, 15))
    assert lost(weight, chosen.dequantize(last), fresh) < lost(weight, refitted.dequantize(levels), fresh)


def test_rows_of_zeros_and_inputs_without_any_keep_finite_scales() -> None:
    weight, gram = weight_and_gram()
    weight[3] = 0
    weight[5, :64] = 0
    for inputs in (gram, torch.zeros_like(gram)):
        grid = awq.range_grid(weight, 64)
        levels = rounding.gptq(weight, rounding.Inverse.of(inputs), grid)
        refitted = rounding.refitted(weight, levels, grid, inputs)
        assert torch.isfinite(refitted.scale).all()
        assert (refitted.scale > 0).all()
        assert (refitted.dequantize(levels)[3] == 0).all()


def test_a_stack_of_grids_comes_apart_again() -> None:
    weight, _ = weight_and_gram()
    grids = [awq.range_grid(weight[:16], 64), awq.range_grid(weight[16:] * 3, 64)]
    for found, grid in zip(awq.Grid.stacked(grids).split([16, 32]), grids, strict=True):
        assert torch.equal(found.scale, grid.scale)
        assert torch.equal(found.zero_point, grid.zero_point)
