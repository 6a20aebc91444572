"""The plugin on an NVIDIA GPU: its token table, and attention in pieces with the backends that vLLM chooses there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
HEADS, KV_HEADS, HEAD, BLOCK = 4, 2, 128, 16


def test_rows_of_an_int8_table_on_a_gpu_are_those_of_a_cpu() -> None:
    from qembed.checkpoint import int8_table
    from qembed.serve.vllm_plugin.int8_table import Int8Embedding

    torch.manual_seed(0)
    table = torch.randn(64, HEAD).half()
    columns = int8_table.column_scales([table])
    weights, scales = int8_table.quantize(table, columns)
    ids = torch.tensor([0, 63, 7])

    def rows(device: str) -> torch.Tensor:
        tensors = {"qweight": weights, "scales": scales, "column_scales": columns}
        layer = SimpleNamespace(**{name: tensor.to(device) for name, tensor in tensors.items()}, output_dtype=torch.float16)
        return Int8Embedding().embedding(layer, ids.to(device)).cpu()

    assert torch.equal(rows("cuda"), rows("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_pieces_is_attention_in_a_whole(dtype: torch.dtype) -> None:
    """Texts of 5, 40 and 19 tokens in pieces of 24 by vLLM's Triton kernel, against the same kernel in a single call."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    from qembed.serve.vllm_plugin.pieces import pieces

    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no NVIDIA GPU with bfloat16 here")
    torch.manual_seed(0)
    lengths = torch.tensor([5, 40, 19], device="cuda", dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    query = torch.randn(64, HEADS, HEAD, device="cuda", dtype=dtype)
    keys, values = torch.randn(2, 8, BLOCK, KV_HEADS, HEAD, device="cuda", dtype=dtype).unbind()
    blocks = torch.tensor([[1, 0, 0], [2, 3, 4], [5, 6, 0]], device="cuda", dtype=torch.int32)

    def attend(rows: slice, first: int, last: int, begins: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query[rows])
        options: dict[str, Any] = {
            "cu_seqlens_q": begins.int(), "max_seqlen_q": int(begins.diff().max()), "seqused_k": tokens.int(),
            "max_seqlen_k": int(tokens.max()), "softmax_scale": HEAD**-0.5, "causal": True, "window_size": (-1, -1),
            "block_table": blocks[first:last], "softcap": 0, "q_descale": None, "k_descale": None, "v_descale": None,
        }  # fmt: skip
        unified_attention(q=query[rows], k=keys, v=values, out=output, **options)
        return output

    whole = attend(slice(0, 64), 0, 3, starts, lengths)
    parts = [
        attend(slice(piece.begin, piece.end), *piece.requests, piece.query_start_loc, piece.seq_lens)
        for piece in pieces(starts, lengths, 24)
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=2e-3 if dtype == torch.float16 else 2e-2)
