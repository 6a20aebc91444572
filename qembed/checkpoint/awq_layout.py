"""The AWQ GEMM int32 layout, both ways.

A linear layer of K inputs and N outputs with groups of g inputs is stored as `qweight` [K, N/8] int32, `qzeros` [K/g, N/8]
int32 and `scales` [K/g, N] float16, so that W[n, k] ≈ (q[k, n] − zero_point[k // g, n]) · scale[k // g, n]. Eight 4-bit values
of neighbouring outputs share an int32; the j-th nibble from the low end holds output ORDER[j] (AutoAWQ, `WQLinear_GEMM`).
All three parts of qembed stand on this file: `quantize` writes the layout, the vLLM plugin and `eval` read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK = len(ORDER)


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack integers 0…15 [rows, N] into int32 [rows, N/8].

    Raises:
        ValueError: a value is outside 0…15, or N is not divisible by 8.
    """
    import torch

    rows, width = values.shape
    if width % PACK:
        raise ValueError(f"{width} columns cannot be packed: not divisible by {PACK}")
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= 15:
        raise ValueError("a 4-bit value is outside 0…15")
    nibbles = values.reshape(rows, width // PACK, PACK)[..., list(ORDER)].to(torch.int64)
    shifts = torch.arange(0, 4 * PACK, 4, device=values.device)
    words = (nibbles << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The integers 0…15 [rows, N] uint8 inside int32 [rows, N/8]; the inverse of `pack`."""
    import torch

    shifts = torch.arange(0, 4 * PACK, 4, dtype=torch.int32, device=packed.device)
    nibbles = ((packed[..., None] >> shifts) & 15).to(torch.uint8)
    inverse = sorted(range(PACK), key=ORDER.__getitem__)
    return nibbles[..., inverse].reshape(packed.shape[0], packed.shape[1] * PACK)


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantize the three packed tensors to the weight [N, K] float32 of a linear layer."""
    values, zero_points = unpack(qweight), unpack(qzeros)
    group_size = values.shape[0] // zero_points.shape[0]
    steps = values.float().unflatten(0, (-1, group_size)) - zero_points.float()[:, None]
    return (steps * scales.float()[:, None]).flatten(0, 1).T.contiguous()
