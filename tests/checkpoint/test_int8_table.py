"""Arithmetic of the INT8 token table: its error, and rows with extreme values."""

from __future__ import annotations

import pytest
import torch

from qembed.checkpoint import int8_table
from qembed.checkpoint.find import SAMPLE, find


def convert(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = int8_table.column_scales(table.split(100))
    return *int8_table.quantize(table, columns), columns


def relative_error(table: torch.Tensor) -> float:
    lost = int8_table.dequantize(*convert(table)).double() - table.double()
    return (lost.norm() / table.double().norm()).item()


def of_rows(table: torch.Tensor) -> torch.Tensor:
    """The relative error of each row."""
    lost = int8_table.dequantize(*convert(table)).double() - table.double()
    return lost.norm(dim=1) / table.double().norm(dim=1)


@pytest.fixture
def table() -> torch.Tensor:
    """A float16 table of the 0.6B's width whose random rows have very different lengths."""
    torch.manual_seed(0)
    return (torch.randn(500, 1024) * 0.02 * torch.logspace(-2, 1, 500)[:, None]).half()


def test_the_parts_have_the_shapes_and_dtypes_of_the_format(table: torch.Tensor) -> None:
    qweight, scales, columns = convert(table)
    assert (qweight.shape, qweight.dtype) == ((500, 1024), torch.int8)
    assert (scales.shape, scales.dtype) == ((500, 1), torch.float32)
    assert (columns.shape, columns.dtype) == ((1024,), torch.float32)
    assert qweight.abs().amax(1).ge(120).all()
    assert qweight.abs().amax(1).eq(127).float().mean() > 0.9
    level = qweight.double() * (0.4 + 0.6 * (qweight.double() / 127) ** 2)
    expected = level * scales.double() * columns.double()
    torch.testing.assert_close(int8_table.dequantize(qweight, scales, columns).double(), expected, rtol=1e-6, atol=0)


def test_less_than_0_8_percent_is_lost_at_the_width_of_the_0_6b(table: torch.Tensor) -> None:
    assert relative_error(table) < 0.008


@pytest.mark.parametrize("width", [1024, 2560, 4096])
def test_no_row_loses_0_8_percent_at_the_widths_of_the_0_6b_4b_and_8b(width: int) -> None:
    torch.manual_seed(1)
    assert of_rows(torch.randn(300, width) * 0.02).max() < 0.008


def test_no_row_of_a_trained_table_loses_0_8_percent() -> None:
    sample = find(SAMPLE)
    lost = of_rows(sample.tensor(sample.prefix + "embed_tokens.weight"))
    assert lost.max() < 0.008
    assert lost.mean() < 0.0065


def test_every_value_becomes_its_nearest_level(table: torch.Tensor) -> None:
    qweight, scales, columns = convert(table)
    exact_levels = (table.float() / columns / scales)[:50, :, None]
    nearest = (exact_levels - int8_table.level(torch.arange(-127, 128))).abs().argmin(-1) - 127
    assert torch.equal(qweight[:50].long(), nearest)


def test_column_scales_and_levels_have_less_error_than_the_best_scale_of_each_row() -> None:
    sample = find(SAMPLE)
    table = sample.tensor(sample.prefix + "embed_tokens.weight")[::4].double()
    greatest = table.abs().amax(1, keepdim=True)
    least = torch.full((len(table),), torch.inf, dtype=torch.float64)
    for ratio in torch.linspace(0.7, 1, 31):
        step = greatest * ratio / 127
        lost = (table / step).round().clamp(-127, 127) * step - table
        least = torch.minimum(least, lost.square().sum(1))
    assert relative_error(table) < 0.85 * (least.sum().sqrt() / table.norm()).item()


def test_columns_with_large_values_add_no_error(table: torch.Tensor) -> None:
    uneven = table.float()
    uneven[:, 7] *= 100
    uneven[:, 500:520] /= 50
    assert relative_error(uneven) < 0.008


def test_rows_and_columns_of_zeros_stay_zero_and_do_not_affect_others(table: torch.Tensor) -> None:
    table[3], table[:, 5] = 0, 0
    qweight, scales, columns = convert(table)
    restored = int8_table.dequantize(qweight, scales, columns)
    assert restored[3].eq(0).all()
    assert restored[:, 5].eq(0).all()
    assert scales.gt(0).all()
    assert columns.gt(0).all()
    assert relative_error(table) < 0.008
    assert int8_table.dequantize(*convert(torch.zeros(4, 8))).eq(0).all()


def test_rows_of_the_smallest_float16_values_are_kept(table: torch.Tensor) -> None:
    table[9] = 0
    table[9, ::2] = 6e-8
    restored = int8_table.dequantize(*convert(table))[9]
    assert (restored - table[9].float()).norm() / table[9].float().norm() < 0.02


def test_an_outliers_error_is_at_most_half_the_largest_step(table: torch.Tensor) -> None:
    table[11, 4] = 60
    qweight, scales, columns = convert(table)
    lost = (int8_table.dequantize(qweight, scales, columns) - table.float()).abs() / columns
    greatest = float(int8_table.level(torch.tensor([127])) - int8_table.level(torch.tensor([126])))
    assert (lost <= scales * greatest * 0.5001).all()


def test_blocks_do_not_change_the_result(table: torch.Tensor) -> None:
    converted = convert(table)
    columns = int8_table.column_scales(table.split(7))
    torch.testing.assert_close(columns, converted[2], rtol=1e-6, atol=0)
    parts = [int8_table.quantize(block, converted[2]) for block in table.split(7)]
    assert torch.equal(torch.cat([part[0] for part in parts]), converted[0])
    assert torch.equal(torch.cat([part[1] for part in parts]), converted[1])


def test_a_table_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="without rows"):
        int8_table.column_scales([])
