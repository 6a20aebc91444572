"""The INT8 token table in vLLM's embedding layer: loaded, quantized while loading, and split over ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qembed.checkpoint import int8_table

pytestmark = pytest.mark.vllm
VOCABULARY, WIDTH = 300, 64
CONFIG = {"quant_method": "qembed_awq", "bits": 4, "group_size": 32, "zero_point": True, "token_table": "int8"}
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def table() -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(VOCABULARY, WIDTH) * 0.02).half()


@pytest.fixture
def parts(table: torch.Tensor) -> Parts:
    columns = int8_table.column_scales([table])
    return *int8_table.quantize(table, columns), columns


def layer(kind: str = "VocabParallelEmbedding", dtype: torch.dtype = torch.float32, rank: int = 0, ranks: int = 1) -> Any:
    """vLLM's layer as rank `rank` of `ranks` creates it with the plugin's quantization config."""
    from vllm.model_executor.layers import vocab_parallel_embedding

    from qembed.serve.vllm_plugin.int8_table import Int8TableConfig

    group = {} if kind == "ParallelLMHead" else {"parallel_group": SimpleNamespace(rank_in_group=rank, world_size=ranks)}
    options: dict[str, Any] = group or {"disable_tp": True}
    config = Int8TableConfig.from_config(CONFIG)
    layer_class = getattr(vocab_parallel_embedding, kind)
    return layer_class(VOCABULARY, WIDTH, params_dtype=dtype, quant_config=config, prefix="x", **options)


def load(module: Any, **tensors: torch.Tensor) -> Any:
    """Load `tensors` into the layer as vLLM's loader does, and finish loading."""
    for name, tensor in tensors.items():
        parameter = getattr(module, name)
        parameter.weight_loader(parameter, tensor)
    module.quant_method.process_weights_after_loading(module)
    return module


def named(parts: Parts) -> dict[str, torch.Tensor]:
    return dict(zip(int8_table.TENSORS, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_looked_up_rows_are_dequantized_to_the_models_dtype(parts: Parts, dtype: torch.dtype) -> None:
    loaded = load(layer(dtype=dtype), **named(parts), weight=torch.empty(0, dtype=torch.float16))
    ids = torch.tensor([[0, 299, 7], [7, 64, 128]])
    rows = loaded.forward(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, int8_table.dequantize(*parts)[ids].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_table_quantized_while_loading_equals_the_stored_one(
    table: torch.Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qembed.serve.vllm_plugin import int8_table as plugin_table

    table = table.to(dtype)
    columns = int8_table.column_scales(table.split(32))
    expected = *int8_table.quantize(table, columns), columns
    monkeypatch.setattr(plugin_table, "BLOCK_ROWS", 32)
    loaded = load(layer(), weight=table)
    for name, tensor in named(expected).items():
        assert torch.equal(getattr(loaded, name)[: len(tensor)], tensor)


def test_after_loading_the_layer_has_only_int8_and_scales(table: torch.Tensor) -> None:
    loaded = load(layer(), weight=table)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.named_parameters()} == {
        "qweight": ((320, WIDTH), torch.int8),
        "scales": ((320, 1), torch.float32),
        "column_scales": ((WIDTH,), torch.float32),
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("source", ["int8", "float"])
def test_each_rank_holds_its_own_rows(table: torch.Tensor, parts: Parts, ranks: int, source: str) -> None:
    height = 320 // ranks
    for rank in range(ranks):
        tensors = named(parts) if source == "int8" else {"weight": table}
        part = load(layer(rank=rank, ranks=ranks), **tensors)
        start, end = rank * height, min((rank + 1) * height, VOCABULARY)
        own = torch.arange(end - start)
        assert part.qweight.shape == (height, WIDTH)
        expected = int8_table.dequantize(*parts)[start:end]
        torch.testing.assert_close(part.quant_method.embedding(part, own), expected, rtol=1e-6, atol=0)
        padding = torch.arange(end - start, height)
        assert part.quant_method.embedding(part, padding).eq(0).all()


def test_a_checkpoint_without_a_table_is_refused(parts: Parts) -> None:
    with pytest.raises(ValueError, match=r"no token table.*embed_tokens\.qweight"):
        load(layer(), weight=torch.empty(0))
    with pytest.raises(ValueError, match="no token table"):
        load(layer(), qweight=parts[0], scales=parts[1])


def test_an_unknown_table_format_is_refused() -> None:
    from qembed.serve.vllm_plugin.int8_table import Int8TableConfig

    with pytest.raises(ValueError, match="'int3'"):
        Int8TableConfig.from_config({**CONFIG, "token_table": "int3"})


def test_a_tied_head_shares_the_table_and_an_untied_one_has_its_own(table: torch.Tensor, parts: Parts) -> None:
    loaded, hidden = load(layer(), **named(parts)), torch.randn(5, WIDTH)
    head = load(layer("ParallelLMHead"), weight=table.float())
    expected = hidden @ table.float().T
    torch.testing.assert_close(head.quant_method.apply(head, hidden)[:, :VOCABULARY], expected, rtol=1e-4, atol=1e-5)
    tied = layer("ParallelLMHead").tie_weights(loaded)
    assert tied.qweight is loaded.qweight
    assert not hasattr(tied, "weight")
    tied.quant_method.process_weights_after_loading(tied)
    expected = hidden @ int8_table.dequantize(*parts).T
    torch.testing.assert_close(tied.quant_method.apply(tied, hidden)[:, :VOCABULARY], expected, rtol=1e-4, atol=1e-5)


def test_vllm_frees_the_tied_head_of_a_pooling_model(parts: Parts) -> None:
    from vllm.model_executor.models.utils import StageMissingLayer

    loaded = load(layer(), **named(parts))
    missing: Any = StageMissingLayer("output", layer("ParallelLMHead").tie_weights(loaded).to("meta"))
    missing.quant_method.process_weights_after_loading(missing)
    assert torch.equal(loaded.forward(torch.arange(9)), int8_table.dequantize(*parts)[:9])


def test_other_layers_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig

    from qembed.serve.vllm_plugin.int8_table import Int8TableConfig

    monkeypatch.setattr(AutoAWQConfig, "get_quant_method", lambda _self, _layer, prefix: f"vLLM's for {prefix}")
    assert Int8TableConfig.from_config(CONFIG).get_quant_method(torch.nn.Linear(2, 2), "mlp") == "vLLM's for mlp"
