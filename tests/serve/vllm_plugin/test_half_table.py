"""The 16-bit token table in vLLM's embedding layer: dtype, copies, ranks, and tied heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.serve.vllm_plugin.test_int8_table import VOCABULARY, WIDTH, load

pytestmark = pytest.mark.vllm
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def table(request: pytest.FixtureRequest) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(VOCABULARY, WIDTH) * 0.02).to(request.param)


def layer(kind: str = "VocabParallelEmbedding", dtype: torch.dtype = torch.float32, rank: int = 0, ranks: int = 1) -> Any:
    from types import SimpleNamespace

    from vllm.model_executor.layers import vocab_parallel_embedding

    from qembed.serve.vllm_plugin.awq import CpuAWQConfig

    group = {} if kind == "ParallelLMHead" else {"parallel_group": SimpleNamespace(rank_in_group=rank, world_size=ranks)}
    options: dict[str, Any] = group or {"disable_tp": True}
    config = CpuAWQConfig.from_config(CONFIG)
    layer_class = getattr(vocab_parallel_embedding, kind)
    return layer_class(VOCABULARY, WIDTH, params_dtype=dtype, quant_config=config, prefix="x", **options)


def test_looked_up_rows_are_float32_and_the_table_stays_16_bit(table: torch.Tensor) -> None:
    loaded = load(layer(), weight=table)
    ids = torch.tensor([[0, 299, 7], [7, 64, 128]])
    rows = loaded.forward(ids)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, table[ids].float())
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.named_parameters()} == {
        "weight": ((320, WIDTH), table.dtype)
    }


def test_a_float32_table_stays_float32() -> None:
    table = torch.randn(VOCABULARY, WIDTH)
    loaded = load(layer(), weight=table)
    assert loaded.weight.dtype == torch.float32
    assert torch.equal(loaded.forward(torch.arange(9)), table[:9])


def test_with_16_bit_activations_the_table_is_packed_at_the_first_product(table: torch.Tensor) -> None:
    tied = layer("ParallelLMHead", torch.bfloat16).tie_weights(embedding := layer(dtype=torch.bfloat16))
    load(embedding, weight=table)
    assert embedding.weight.dtype == torch.bfloat16
    assert torch.equal(embedding.forward(torch.arange(9)), table[:9].bfloat16())
    assert not hasattr(embedding, "cpu_linear")
    hidden = torch.randn(5, WIDTH).bfloat16()
    for _ in range(2):
        logits = tied.quant_method.apply(tied, hidden)[:, :VOCABULARY]
        torch.testing.assert_close(logits, hidden @ table.bfloat16().T, rtol=2e-2, atol=1e-3)
    assert hasattr(tied, "cpu_linear")


def test_compressed_tensors_checkpoints_keep_a_16_bit_table_too(table: torch.Tensor) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from qembed.serve.vllm_plugin.compressed_tensors import CpuCompressedTensorsConfig
    from tests.e2e.test_int4_kernel import compressed_tensors_config

    config = CpuCompressedTensorsConfig.from_config(compressed_tensors_config(128, symmetric=True))
    module = VocabParallelEmbedding(
        VOCABULARY, WIDTH, params_dtype=torch.float32, quant_config=config, prefix="x", disable_tp=True
    )
    loaded = load(module, weight=table)
    assert loaded.weight.dtype == table.dtype
    assert torch.equal(loaded.forward(torch.arange(9)), table[:9].float())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_holds_its_own_rows(table: torch.Tensor, ranks: int) -> None:
    height = 320 // ranks
    for rank in range(ranks):
        part = load(layer(rank=rank, ranks=ranks), weight=table)
        start, end = rank * height, min((rank + 1) * height, VOCABULARY)
        assert part.weight.shape == (height, WIDTH)
        assert torch.equal(part.weight[: end - start], table[start:end])
        assert part.weight[end - start :].eq(0).all()


def test_a_checkpoint_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no token table"):
        load(layer())


def test_a_tied_head_shares_the_table_and_an_untied_one_has_its_own(table: torch.Tensor) -> None:
    hidden = torch.randn(5, WIDTH)
    own = load(layer("ParallelLMHead"), weight=table.float())
    tied = layer("ParallelLMHead").tie_weights(embedding := layer())
    load(embedding, weight=table)
    assert tied.weight is embedding.weight
    for head in (own, tied):
        expected = hidden @ table.float().T
        torch.testing.assert_close(head.quant_method.apply(head, hidden)[:, :VOCABULARY], expected, rtol=1e-4, atol=1e-5)


def test_vllm_frees_the_tied_head_of_a_pooling_model(table: torch.Tensor) -> None:
    from vllm.model_executor.models.utils import StageMissingLayer

    embedding = layer()
    missing: Any = StageMissingLayer("output", layer("ParallelLMHead").tie_weights(embedding).to("meta"))
    load(embedding, weight=table)
    missing.quant_method.process_weights_after_loading(missing)
    assert torch.equal(embedding.forward(torch.arange(9)), table[:9].float())
