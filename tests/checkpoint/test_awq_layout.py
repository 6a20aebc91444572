from __future__ import annotations

import pytest
import torch

from qembed.checkpoint.awq_layout import dequantize, pack, unpack


def test_nibbles_are_in_the_order_of_the_awq_gemm_layout() -> None:
    outputs = torch.arange(8)[None]
    # From the low end of the int32: outputs 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ's order_map, written out).
    assert pack(outputs).item() == 0x75316420
    assert unpack(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist() == [list(range(8))]


def test_unpacking_inverts_packing() -> None:
    values = torch.randint(0, 16, (37, 64), generator=torch.Generator().manual_seed(0))
    packed = pack(values)
    assert packed.shape == (37, 8)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack(packed).long(), values)


def test_dequantize_is_value_minus_zero_point_times_scale() -> None:
    values = torch.randint(0, 16, (64, 8), generator=torch.Generator().manual_seed(1))
    zero_points = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(2))
    scales = torch.rand(2, 8, generator=torch.Generator().manual_seed(3)).half()
    weight = dequantize(pack(values), pack(zero_points), scales)
    assert weight.shape == (8, 64)
    for output, inputs in ((0, 0), (3, 31), (5, 32), (7, 63)):
        group = inputs // 32
        expected = (values[inputs, output] - zero_points[group, output]) * scales[group, output].float()
        assert weight[output, inputs].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("values", [torch.tensor([[16] * 8]), torch.tensor([[-1] * 8]), torch.zeros(2, 9)])
def test_invalid_values_and_shapes_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"packed|outside"):
        pack(values)
