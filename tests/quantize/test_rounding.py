"""GPTQ rounding, its factor of the inverse, and the refit of scales, on random weights and inputs."""

from __future__ import annotations

import pytest
import torch

from qembed.quantize import awq, rounding
from tests.quantize.test_awq import error, weight_and_gram


def test_gptq_returns_levels_and_equals_rtn_for_uncorrelated_inputs() -> None:
    weight, gram = weight_and_gram()
    grid = awq.range_grid(weight, 64)
    levels = rounding.gptq(weight, rounding.Inverse.of(gram), grid)
    assert torch.equal(levels, levels.round().clamp(0, 15))
    uncorrelated = rounding.gptq(weight, rounding.Inverse.of(torch.eye(128)), grid)
    assert torch.equal(uncorrelated, grid.quantize(weight))


def test_inverse_factor_is_the_cholesky_factor_of_the_damped_inverse() -> None:
    _, gram = weight_and_gram()
    upper = rounding.inverse_factor(gram, 0.01, torch.arange(128)).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(128)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(128).double(), atol=1e-3, rtol=0)
    assert torch.equal(upper, upper.triu())


def test_inverse_factor_is_right_for_matrices_inverted_by_halves() -> None:
    x = torch.randn(1500, 700, generator=torch.Generator().manual_seed(2))
    gram = x.T @ x
    upper = rounding.inverse_factor(gram, 0.01, torch.arange(700)).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(700)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(upper, expected, rtol=1e-5, atol=1e-8)


def test_least_squares_equals_lstsq_and_is_zero_for_zero_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 32, generator=generator), torch.randn(8, 32, generator=generator)
    target = x @ torch.randn(32, 8, generator=generator)
    fitted = weight + rounding.Inverse.of(x.T @ x, 1e-9).least_squares((target - x @ weight.T).T @ x)
    torch.testing.assert_close(fitted, torch.linalg.lstsq(x, target).solution.T, rtol=1e-3, atol=1e-3)
    assert torch.equal(rounding.Inverse.of(torch.zeros(32, 32)).least_squares(torch.zeros(8, 32)), torch.zeros(8, 32))


def test_remaining_variance_predicts_the_error_of_gptq() -> None:
    weight, gram = weight_and_gram(outputs=256)
    grid = awq.range_grid(weight, 64)
    steps = grid.scale.square().sum(0).repeat_interleave(64)
    expected = (steps * rounding.Inverse.of(gram).remaining_variance()).sum().item() / 12
    damped = gram + rounding.DAMPING * gram.diagonal().mean() * torch.eye(128)
    actual = error(weight, grid.dequantize(rounding.gptq(weight, rounding.Inverse.of(gram), grid)), damped)
    assert actual == pytest.approx(expected, rel=0.1)


def test_scaled_inverse_is_the_inverse_of_the_scaled_gram_matrix() -> None:
    _, gram = weight_and_gram()
    gram += 0.1 * gram.diagonal().mean() * torch.eye(128)
    scales = torch.linspace(0.5, 2, 128)
    inverse = rounding.Inverse.of(gram, 1e-6).scaled(scales)
    expected = rounding.inverse_factor(gram / (scales[:, None] * scales), 1e-6, inverse.order)
    torch.testing.assert_close(inverse.upper, expected, rtol=0.02, atol=0.01 * expected.abs().max().item())


def test_refitted_scales_have_less_error_on_fresh_inputs() -> None:
    weight, gram = weight_and_gram(outputs=96, tokens=3000)
    generator = torch.Generator().manual_seed(0)
    torch.randn(96, 128, generator=generator)
    x = torch.randn(3000, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.1
    x[:, ::17] *= 12
    fitted, fresh = x[:1500].T @ x[:1500], x[1500:].T @ x[1500:]
    torch.testing.assert_close(fitted + fresh, gram, rtol=1e-3, atol=1e-1)
    grid = awq.search_clip(weight, fitted, 64)
    inverse = rounding.Inverse.of(fitted)
    levels = rounding.gptq(weight, inverse, grid)
    refitted = rounding.refit_scales(levels, grid, damped := rounding.damp(fitted), weight @ damped)
    assert torch.equal(refitted.scale, refitted.scale.half().float())
    assert (refitted.scale > 0).all()
    assert torch.equal(refitted.zero_point, grid.zero_point)
    before = error(weight, grid.dequantize(levels), fresh)
    assert error(weight, refitted.dequantize(levels), fresh) < 0.98 * before
    last_levels, last_grid = rounding.round_and_refit(weight, fitted, inverse, grid)
    assert torch.equal(last_levels, last_levels.round().clamp(0, 15))
    assert error(weight, last_grid.dequantize(last_levels), fresh) < error(weight, refitted.dequantize(levels), fresh)


def test_zero_rows_and_zero_inputs_keep_positive_finite_scales() -> None:
    weight, gram = weight_and_gram()
    weight[3] = 0
    weight[5, :64] = 0
    for input_gram in (gram, torch.zeros_like(gram)):
        grid = awq.range_grid(weight, 64)
        levels = rounding.gptq(weight, rounding.Inverse.of(input_gram), grid)
        refitted = rounding.refit_scales(levels, grid, damped := rounding.damp(input_gram), weight @ damped)
        assert torch.isfinite(refitted.scale).all()
        assert (refitted.scale > 0).all()
        assert (refitted.dequantize(levels)[3] == 0).all()
