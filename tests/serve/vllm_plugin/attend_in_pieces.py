"""`python -m tests.serve.vllm_plugin.attend_in_pieces DEVICE DTYPE`: vLLM's Triton attention, whole and in pieces.

Texts of 5, 40 and 19 tokens over a paged cache, and the same in pieces of 24 tokens as `pieces` describes them. Prints as JSON
the largest difference of the two, and that of the whole from attention written out in torch. On the CPU Triton's interpreter
runs the kernel.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

HEADS, KV_HEADS, HEAD, BLOCK = 4, 2, 64, 16
LENGTHS, SIZE = (5, 40, 19), 24


def main(device: str, dtype_name: str) -> None:
    """Compute and print."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        import triton.backends

        # vLLM's build for CPUs takes Triton only if it has a backend for them.
        triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    from qembed.serve.vllm_plugin.pieces import pieces

    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    lengths = torch.tensor(LENGTHS, device=device, dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    total = sum(LENGTHS)
    query = torch.randn(total, HEADS, HEAD, device=device, dtype=dtype)
    keys, values = torch.randn(2, 8, BLOCK, KV_HEADS, HEAD, device=device, dtype=dtype).unbind()
    blocks = torch.tensor([[1, 0, 0], [2, 3, 4], [5, 6, 0]], device=device, dtype=torch.int32)

    def attend(rows: slice, requests: tuple[int, int], begins: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query[rows])
        options: dict[str, Any] = {
            "cu_seqlens_q": begins.int(), "max_seqlen_q": int(begins.diff().max()), "seqused_k": tokens.int(),
            "max_seqlen_k": int(tokens.max()), "softmax_scale": HEAD**-0.5, "causal": True, "window_size": (-1, -1),
            "block_table": blocks[slice(*requests)], "softcap": 0, "q_descale": None, "k_descale": None, "v_descale": None,
        }  # fmt: skip
        unified_attention(q=query[rows], k=keys, v=values, out=output, **options)
        return output

    whole = attend(slice(0, total), (0, len(LENGTHS)), starts, lengths)
    parts = [
        attend(slice(piece.begin, piece.end), piece.requests, piece.query_start_loc, piece.seq_lens)
        for piece in pieces(starts, lengths, SIZE)
    ]
    expected = []
    for number, length in enumerate(LENGTHS):
        rows = slice(int(starts[number]), int(starts[number + 1]))
        cached = (
            tensor[blocks[number].long()].flatten(0, 1)[:length].repeat_interleave(HEADS // KV_HEADS, 1)
            for tensor in (keys, values)
        )
        q, k, v = (tensor.transpose(0, 1).double() for tensor in (query[rows], *cached))
        expected.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    print(
        json.dumps(
            {
                "pieces": len(parts),
                "between": float((torch.cat(parts) - whole).abs().max()),
                "from_torch": float((whole.double() - torch.cat(expected)).abs().max()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
