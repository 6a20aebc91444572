"""The INT4 linear layer against the dequantized weights, by another reader of the packed tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from qembed import packing
from qembed.serve.vllm_plugin import int4

ROWS = (1, 2, 31, 32, 33, 129, 513)


class Layer:
    """Random 4-bit values [K, N], zero points and scales [K/g, N], and the float32 weight [N, K] that they stand for."""

    def __init__(self, outputs: int, inputs: int, group: int, symmetric: bool = False) -> None:
        torch.manual_seed(outputs + inputs + group)
        groups = inputs // group
        self.values = torch.randint(0, 16, (inputs, outputs))
        self.zeros = torch.full((groups, outputs), 8) if symmetric else torch.randint(0, 16, (groups, outputs))
        self.scales = (torch.rand(groups, outputs) / 100).half()
        self.weight = packing.dequantize(packing.pack(self.values), packing.pack(self.zeros), self.scales)
        self.bias = torch.randn(outputs)


def words(values: torch.Tensor) -> torch.Tensor:
    """Values [rows, 8n] as int32 [rows, n], the first in the lowest nibble."""
    nibbles = values.reshape(values.shape[0], -1, 8) << torch.arange(0, 32, 4)
    return nibbles.sum(-1).to(torch.uint32).view(torch.int32)


def prepared(layer: Layer) -> int4.Weight:
    return int4.prepare(words(layer.values.T), layer.scales.T, layer.zeros.T)


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(256, 512, 128), (40, 256, 32), (1032, 1024, 64), (24, 384, 384)])
def test_a_product_is_that_of_the_dequantized_weights(outputs: int, inputs: int, group: int) -> None:
    layer = Layer(outputs, inputs, group)
    weight = prepared(layer)
    assert torch.equal(int4.dequantize(weight, torch.empty(outputs, inputs)), layer.weight)
    for rows in ROWS:
        x = torch.randn(rows, inputs)
        torch.testing.assert_close(int4.linear(x, weight, None), linear(x, layer.weight), rtol=1e-4, atol=1e-4)
        biased = linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(int4.linear(x, weight, layer.bias), biased, rtol=1e-4, atol=1e-4)


def test_blocks_of_output_rows_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Layer(104, 256, 64), torch.randn(5, 256)
    monkeypatch.setattr(int4, "SCRATCH_BYTES", 4 * 256 * 24)
    torch.testing.assert_close(int4.linear(x, prepared(layer), None), linear(x, layer.weight), rtol=1e-4, atol=1e-4)


def test_weights_take_half_a_byte_each_and_scales_stay_float16() -> None:
    weight = prepared(Layer(256, 512, 128))
    assert weight.values.numel() * weight.values.element_size() == 256 * 512 // 2
    assert weight.scales.dtype == torch.float16
    widened = int4.prepare(torch.zeros(8, 4, dtype=torch.int32), torch.full((8, 1), 1e-9), torch.zeros(8, 1))
    assert widened.scales.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_input_gives_a_16_bit_output(dtype: torch.dtype) -> None:
    layer = Layer(64, 256, 128)
    x = torch.randn(3, 256, dtype=dtype)
    result = int4.linear(x, prepared(layer), layer.bias.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result, linear(x.float(), layer.weight, layer.bias.to(dtype).float()).to(dtype))


@pytest.mark.vllm
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_the_kernel_takes_weights_as_vllm_hands_them_over(group: int, symmetric: bool, layout: str) -> None:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from qembed.serve.vllm_plugin.kernel import Int4LinearKernel

    inputs, outputs = 256, 40
    layer = Layer(outputs, inputs, inputs if group == -1 else group, symmetric)
    config = MPLinearLayerConfig(
        full_weight_shape=(inputs, outputs),
        partition_weight_shape=(inputs, outputs),
        weight_type=scalar_types.uint4b8 if symmetric else scalar_types.uint4,
        act_type=torch.float32,
        group_size=group,
        zero_points=not symmetric,
    )
    assert Int4LinearKernel.can_implement(config) == (True, None)
    kernel = Int4LinearKernel(config, "weight", "scale", "zero")
    module: Any = torch.nn.Module()
    packed, scales, zeros = words(layer.values.T), layer.scales.T.float(), words(layer.zeros).T
    if layout == "awq":
        module.weight, module.scale = parameter(packed.T, 0, 1), parameter(scales.T, 0, 1)
    else:
        module.weight, module.scale = parameter(packed, 1, 0), parameter(scales, 1, 0)
    module.zero = None if symmetric else parameter(zeros, 1, 0)
    kernel.process_weights_after_loading(module)
    x = torch.randn(2, 3, inputs)
    torch.testing.assert_close(
        kernel.apply_weights(module, x, layer.bias), linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4
    )  # fmt: skip


def parameter(data: torch.Tensor, input_dim: int, output_dim: int) -> Any:
    """As vLLM's parameters: a tensor that says which way round it lies."""
    made: Any = torch.nn.Parameter(data.contiguous(), requires_grad=False)
    made.input_dim, made.output_dim = input_dim, output_dim
    return made


@pytest.mark.vllm
def test_on_a_gpu_the_plugin_brings_the_int8_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms
    from vllm.model_executor.layers import quantization

    from qembed.serve import vllm_plugin

    registered: dict[str, type] = {}
    platform = SimpleNamespace(is_cpu=lambda: False, supported_quantization=[])
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", registered)
    monkeypatch.setattr(platforms, "_current_platform", platform)
    vllm_plugin.register()
    assert list(registered) == ["qembed_awq"]
    platform.is_cpu = lambda: True
    vllm_plugin.register()
    assert set(registered) == {"qembed_awq", "awq"}
