"""The plugin on an NVIDIA GPU: its token table, and attention in pieces by vLLM's Triton kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.serve.vllm_plugin.test_pieces import attend_in_pieces

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
WIDTH = 128


def test_rows_of_an_int8_table_on_a_gpu_are_those_of_a_cpu() -> None:
    from qembed.checkpoint import int8_table
    from qembed.serve.vllm_plugin.int8_table import Int8Embedding

    torch.manual_seed(0)
    table = torch.randn(64, WIDTH).half()
    columns = int8_table.column_scales([table])
    weights, scales = int8_table.quantize(table, columns)
    ids = torch.tensor([0, 63, 7])

    def rows(device: str) -> torch.Tensor:
        tensors = {"qweight": weights, "scales": scales, "column_scales": columns}
        layer = SimpleNamespace(**{name: tensor.to(device) for name, tensor in tensors.items()}, output_dtype=torch.float16)
        return Int8Embedding().embedding(layer, ids.to(device)).cpu()

    assert torch.equal(rows("cuda"), rows("cpu"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_triton_attention_in_pieces_is_attention_in_a_whole(dtype: str) -> None:
    if dtype == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no NVIDIA GPU with bfloat16 here")
    result = attend_in_pieces("cuda", dtype)
    assert result["between"] < (1e-3 if dtype == "float16" else 1e-2)
    assert result["from_torch"] < (5e-3 if dtype == "float16" else 4e-2)
