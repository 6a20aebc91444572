"""The INT4 linear layer, compiled and in torch, against a product with the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from qembed.checkpoint import awq_layout
from qembed.serve.vllm_plugin import int4_bytes, int4_native, int4_torch
from qembed.serve.vllm_plugin.int4_bytes import Instructions

ROWS = (1, 2, 31, 32, 33, 127, 128, 129, 513, 2048)
Multiply = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

needs_compiled = pytest.mark.skipif(int4_native.library() is None, reason="no compiled kernel here (no compiler, or no AVX2)")


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of `result − exact`, relative to that of `exact`."""
    return float((result.double() - exact.double()).norm() / exact.double().norm())


class Layer:
    """Random 4-bit values [K, N], zero points and scales [K/g, N], and the dequantized float32 weight [N, K]."""

    def __init__(self, outputs: int, inputs: int, group: int, symmetric: bool = False) -> None:
        torch.manual_seed(outputs + inputs + group)
        groups = inputs // group
        self.values = torch.randint(0, 16, (inputs, outputs))
        self.zeros = torch.full((groups, outputs), 8) if symmetric else torch.randint(0, 16, (groups, outputs))
        self.scales = (torch.rand(groups, outputs) / 100).half()
        levels = self.values - self.zeros.repeat_interleave(group, 0)
        self.weight = (levels * self.scales.float().repeat_interleave(group, 0)).T.contiguous()
        self.bias = torch.randn(outputs)


def words(values: torch.Tensor) -> torch.Tensor:
    """Values [rows, 8n] as int32 [rows, n], the first in the lowest nibble."""
    nibbles = values.reshape(values.shape[0], -1, 8) << torch.arange(0, 32, 4)
    return nibbles.sum(-1).to(torch.uint32).view(torch.int32)


def rows_of(layer: Layer) -> int4_torch.ReadRows:
    return lambda start, end: layer.values.T[start:end].to(torch.uint8)


def in_torch(layer: Layer) -> Multiply:
    weight = int4_torch.prepare(rows_of(layer), layer.scales.T, layer.zeros.T)
    return lambda x, bias: int4_torch.linear(x, weight, bias)


def compiled(layer: Layer) -> Multiply:
    inputs, outputs = layer.values.shape
    weight = int4_native.prepare(rows_of(layer), layer.scales.T, layer.zeros.T, inputs)
    return lambda x, bias: int4_native.linear(x, weight, outputs, bias)


def supported() -> Instructions:
    library = int4_native.library()
    return Instructions(library.qembed_int4_bytes_supported() if library is not None else 0)


needs_vnni = pytest.mark.skipif(Instructions.VNNI not in supported(), reason="no AVX-512 VNNI here")
needs_amx = pytest.mark.skipif(Instructions.AMX not in supported(), reason="no AMX here")


def by_bytes(layer: Layer, instruction: Instructions, digits: int = 2) -> Multiply:
    inputs, outputs = layer.values.shape
    weight = int4_bytes.prepare(rows_of(layer), layer.scales.T, layer.zeros.T, inputs)
    return lambda x, bias: int4_bytes.linear(x, weight, outputs, bias, digits=digits, instruction=instruction)


def by_vnni(layer: Layer) -> Multiply:
    return by_bytes(layer, Instructions.VNNI)


def by_amx(layer: Layer) -> Multiply:
    return by_bytes(layer, Instructions.AMX)


@pytest.fixture(
    params=[
        in_torch,
        pytest.param(compiled, marks=needs_compiled),
        pytest.param(by_vnni, marks=needs_vnni),
        pytest.param(by_amx, marks=needs_amx),
    ]
)
def prepare(request: pytest.FixtureRequest) -> Callable[[Layer], Multiply]:
    return request.param


SHAPES = [(256, 512, 128), (40, 256, 32), (1032, 1024, 64), (24, 384, 384), (13, 200, 200), (16, 96, 24), (52, 160, 8)]


@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_match_those_of_the_dequantized_weights(
    prepare: Callable[[Layer], Multiply], outputs: int, inputs: int, group: int, symmetric: bool
) -> None:
    layer = Layer(outputs, inputs, group, symmetric)
    multiply = prepare(layer)
    for rows in ROWS:
        x = torch.randn(rows, inputs)
        exact = linear(x.double(), layer.weight.double())
        assert relative_error(multiply(x, None), exact) < 5e-5
        assert relative_error(multiply(x, layer.bias), exact + layer.bias) < 5e-5


def test_a_row_does_not_depend_on_the_rest_of_the_batch(prepare: Callable[[Layer], Multiply]) -> None:
    """With the compiled kernels to the last bit. The order of torch's sums depends on the number of rows."""
    layer, x = Layer(104, 512, 64), torch.randn(2048, 512)
    multiply = prepare(layer)
    full = multiply(x, None)
    for rows in ROWS:
        part = multiply(x[-rows:].contiguous(), None)
        if prepare is not in_torch:
            assert torch.equal(part, full[-rows:])
        assert relative_error(part, full[-rows:]) < 1e-6


def test_an_outlier_channel_costs_less_precision_than_bfloat16(
    prepare: Callable[[Layer], Multiply],
) -> None:
    """Trained models have channels a hundred times the others. Its weights are zero here, so only the others count."""
    layer = Layer(64, 1024, 128)
    x = torch.randn(9, 1024)
    x[:, 300] *= 100
    layer.weight[:, 300] = 0
    layer.values[300] = layer.zeros[300 // 128]
    exact = linear(x.double(), layer.weight.double())
    in_bfloat16 = linear(x.bfloat16().double(), layer.weight.double())
    assert relative_error(prepare(layer)(x, None), exact) < relative_error(in_bfloat16, exact) / 2


def test_a_non_finite_input_affects_only_its_row(prepare: Callable[[Layer], Multiply]) -> None:
    layer, x = Layer(64, 256, 64), torch.randn(12, 256)
    x[3, 70], x[7, 200] = torch.nan, torch.inf
    result = prepare(layer)(x, None)
    finite = [row for row in range(12) if row not in (3, 7)]
    assert not result[[3, 7]].isfinite().any()
    assert relative_error(result[finite], linear(x[finite].double(), layer.weight.double())) < 1e-4


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-36, 1e-20, 1e20])
def test_rows_of_any_magnitude_give_finite_results(prepare: Callable[[Layer], Multiply], size: float) -> None:
    layer, x = Layer(64, 256, 64), torch.randn(3, 256)
    x[1] *= size
    result, exact = prepare(layer)(x, None), linear(x.double(), layer.weight.double())
    assert relative_error(result[[0, 2]], exact[[0, 2]]) < 1e-4
    assert (result[1] - exact[1]).norm() <= 1e-4 * exact[1].norm() + 1e-30


def test_the_number_of_threads_does_not_matter(prepare: Callable[[Layer], Multiply]) -> None:
    layer, x = Layer(1040, 256, 64), torch.randn(150, 256)
    multiply, threads = prepare(layer), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = multiply(x, None)
        torch.set_num_threads(5)
        together = multiply(x, None)
    finally:
        torch.set_num_threads(threads)
    assert relative_error(together, alone) < 1e-6


@needs_compiled
@pytest.mark.skipif(not int4_native.has_vnni(), reason="no AVX-VNNI here, or it is switched off")
def test_avx_vnni_gives_identical_results(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(72, 512, 64)
    multiply = compiled(layer)
    for rows in ROWS[:-1]:
        x = torch.randn(rows, 512)
        monkeypatch.setattr(int4_native, "has_vnni", lambda: True)
        fast = multiply(x, layer.bias)
        monkeypatch.setattr(int4_native, "has_vnni", lambda: False)
        assert torch.equal(multiply(x, layer.bias), fast)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_torchs_capability_limit_disables_avx_vnni(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    assert not int4_native.has_vnni.__wrapped__()


@needs_compiled
def test_a_group_of_12_is_for_the_kernel_of_avx2() -> None:
    layer, x = Layer(16, 96, 12), torch.randn(5, 96)
    assert int4_bytes.chunk_of(12) is None
    assert relative_error(compiled(layer)(x, None), linear(x.double(), layer.weight.double())) < 5e-5


@needs_amx
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_amx_and_avx512_vnni_give_identical_results(outputs: int, inputs: int, group: int, digits: int) -> None:
    layer = Layer(outputs, inputs, group)
    tiles, vectors = by_bytes(layer, Instructions.AMX, digits), by_bytes(layer, Instructions.VNNI, digits)
    for rows in (*ROWS[:-1], 1023, 1025):
        x = torch.randn(rows, inputs)
        assert torch.equal(tiles(x, layer.bias), vectors(x, layer.bias))


@needs_vnni
def test_products_are_those_of_the_rounded_activations() -> None:
    """One digit: the exact product with activations that are multiples of 1/127 of their group's largest magnitude."""
    layer, x = Layer(64, 512, 128), torch.randn(9, 512)
    groups = x.double().unflatten(1, (-1, 128))
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / step).round() * step).flatten(1)
    result = by_bytes(layer, Instructions.VNNI, digits=1)(x, None)
    assert relative_error(result, rounded @ layer.weight.double().T) < 1e-6
    assert relative_error(result, x.double() @ layer.weight.double().T) > 1e-3


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_torchs_capability_limit_disables_bytes(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    assert int4_bytes.instructions.__wrapped__() is None


@needs_compiled
def test_no_rows_give_no_rows() -> None:
    assert compiled(Layer(40, 64, 32))(torch.empty(0, 64), None).shape == (0, 40)


def test_products_in_several_blocks_of_outputs_match(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Layer(104, 256, 64), torch.randn(5, 256)
    monkeypatch.setattr(int4_torch, "SCRATCH_BYTES", 4 * 256 * 24)
    monkeypatch.setattr(int4_torch, "BLOCK_OUTPUTS", 40)
    torch.testing.assert_close(in_torch(layer)(x, None), linear(x, layer.weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prepare_weight",
    [
        int4_torch.prepare,
        lambda *tensors: int4_native.prepare(*tensors, inputs=512),
        lambda *tensors: int4_bytes.prepare(*tensors, inputs=512),
    ],
)
def test_weights_take_half_a_byte_and_scales_stay_float16(prepare_weight: Callable[..., int4_torch.Weight]) -> None:
    layer = Layer(256, 512, 128)
    weight = prepare_weight(rows_of(layer), layer.scales.T.float(), layer.zeros.T)
    assert weight.values.numel() * weight.values.element_size() == 256 * 512 // 2
    assert weight.scales.numel() == weight.zeros.numel() == 256 * 4
    assert weight.scales.dtype == torch.float16
    assert weight.zeros.element_size() == 1
    wide = prepare_weight(rows_of(layer), torch.full((256, 4), 1e-9), layer.zeros.T)
    assert wide.scales.dtype == torch.float32


@needs_compiled
def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    layer = Layer(32, 128, 64)
    scales = layer.scales.T.float() * 1.0003
    weight = int4_native.prepare(rows_of(layer), scales, layer.zeros.T, 128)
    x = torch.randn(3, 128)
    assert relative_error(int4_native.linear(x, weight, 32, None), linear(x.double(), layer.weight.double() * 1.0003)) < 5e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_input_gives_a_16_bit_output(prepare: Callable[[Layer], Multiply], dtype: torch.dtype) -> None:
    layer = Layer(72, 256, 128)
    x = torch.randn(3, 256, dtype=dtype)
    result = prepare(layer)(x, layer.bias.to(dtype))
    assert result.dtype == dtype
    exact = linear(x.double(), layer.weight.double(), layer.bias.to(dtype).double())
    assert relative_error(result, exact) < 2 * relative_error(exact.to(dtype), exact)


@pytest.mark.parametrize(("group", "chunk"), [(32, 32), (64, 64), (128, 128), (384, 128), (200, 100), (3072, 128), (6, None)])
def test_the_chunk_divides_the_group(group: int, chunk: int | None) -> None:
    assert int4_native.chunk_of(group) == chunk


def test_the_fake_operators_match_the_real_ones() -> None:
    """torch.compile uses the fake ones."""
    layer, x = Layer(40, 64, 32), torch.randn(3, 64)
    torch_weight = int4_torch.prepare(rows_of(layer), layer.scales.T, layer.zeros.T)
    checks = [(torch.ops.qembed.int4_linear.default, (x, *torch_weight, None))]
    if int4_native.library() is not None:
        weight = int4_native.prepare(rows_of(layer), layer.scales.T, layer.zeros.T, 64)
        checks.append((torch.ops.qembed.int4_panels.default, (x, *weight, None, 40)))
    if int4_bytes.instructions() is not None:
        weight = int4_bytes.prepare(rows_of(layer), layer.scales.T, layer.zeros.T, 64)
        checks.append((torch.ops.qembed.int4_bytes.default, (x, *weight, None, 40)))
    for operator, arguments in checks:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_kernel_that_was_not_built_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_native, "LIBRARY", "qembed.serve.vllm_plugin._not_built")
    assert int4_native.library.__wrapped__() is None


@pytest.mark.vllm
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("implementation", ["fastest", "avx2", "torch"])
def test_the_layer_loads_every_weight_layout_of_vllm(
    group: int, symmetric: bool, layout: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "torch":
        monkeypatch.setattr(int4_native, "library", lambda: None)
    elif implementation == "avx2":
        monkeypatch.setattr(int4_bytes, "instructions", lambda: None)
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from qembed.serve.vllm_plugin.int4_layer import Int4LinearKernel

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
    scales, zeros = layer.scales.T.float(), words(layer.zeros).T
    if layout == "awq":
        module.weight, module.scale = parameter(awq_layout.pack(layer.values), 0, 1, 1), parameter(scales.T, 0, 1)
        zeros = awq_layout.pack(layer.zeros)
    elif layout == "gptq":
        module.weight, module.scale = parameter(words(layer.values.T).T, 0, 1, 0), parameter(scales.T, 0, 1)
    else:
        module.weight, module.scale = parameter(words(layer.values.T), 1, 0, 1), parameter(scales, 1, 0)
    module.zero = None if symmetric else parameter(zeros, 1, 0)
    kernel.process_weights_after_loading(module)
    x = torch.randn(2, 3, inputs)
    result = kernel.apply_weights(module, x, layer.bias)
    assert result.shape == (2, 3, outputs)
    exact = linear(x.double(), layer.weight.double(), layer.bias.double())
    assert relative_error(result.flatten(0, 1), exact.flatten(0, 1)) < 1e-4


def parameter(data: torch.Tensor, input_dim: int, output_dim: int, packed_dim: int | None = None) -> Any:
    """A parameter with the attributes of vLLM's: which dimension is the inputs, the outputs, and packed."""
    tensor: Any = torch.nn.Parameter(data.contiguous(), requires_grad=False)
    tensor.input_dim, tensor.output_dim, tensor.packed_dim = input_dim, output_dim, packed_dim
    return tensor


@pytest.mark.vllm
def test_on_a_gpu_the_plugin_registers_only_the_int8_table(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert set(registered) == {"qembed_awq", "awq", "compressed-tensors"}
