"""The token table in INT8, both ways: one scale a row, over columns brought to the same size.

A table E of V tokens and width H is stored as `qweight` [V, H] int8 (−127…127), `scales` [V, 1] float32 and `column_scales`
[H] float32, so that E[v, h] ≈ qweight[v, h] · scales[v] · column_scales[h]. Some channels of a trained table are greater than
others in every row, and would set the step of all of them: each column is first divided by its root mean square, which loses
less than a search for the best scale of each row does. Scales are float32, because a float16 one would be subnormal, or zero,
for rows near zero; at a width of 1024 the difference is 0.2% of the table. Rows of normal values lose 0.79% at the width of the
0.6B (1,024), 0.84% at the 4B's (2,560), 0.87% at the 8B's (4,096): tests/test_token_table.py.
All three parts of qembed stand on this file: `quantize` writes such tables, the vLLM plugin makes and reads them, `eval` reads
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INT8 = "int8"
QUANT_METHOD = "qembed_awq"
"""`quant_method` in config.json of an AWQ checkpoint whose token table is INT8. No loader but our plugin knows it."""
TENSORS = ("qweight", "scales", "column_scales")
LEVELS = 127
BLOCK_ROWS = 2048
"""Rows of a table that are in float32 at once."""


def column_scales(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The root mean square [H] float32 of each column of a table that comes in `blocks` [rows, H]; 1 for columns of zeros.

    Raises:
        ValueError: there are no blocks.
    """
    import torch

    total, rows = None, 0
    for block in blocks:
        squares = block.double().square().sum(0)
        total, rows = squares if total is None else total.add_(squares), rows + block.shape[0]
    if total is None:
        raise ValueError("a table without rows")
    means = (total / rows).sqrt_().float()
    return torch.where(means > 0, means, torch.ones_like(means))


def quantize(block: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`qweight` [rows, H] int8 and `scales` [rows, 1] float32 of `block` [rows, H] over `columns` (`column_scales`) [H].

    The greatest value of a row becomes ±127. A row of zeros gets the scale 1.
    """
    import torch

    values = block.float() / columns
    scales = values.abs().amax(1, keepdim=True) / LEVELS
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (values / scales).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scales


def dequantize(qweight: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The rows [..., H] float32 that `qweight` [..., H], `scales` [..., 1] and `columns` [H] stand for."""
    return qweight.float().mul_(scales).mul_(columns)
