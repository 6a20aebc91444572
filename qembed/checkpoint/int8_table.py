"""The token table in INT8: one scale per row, after columns are brought to the same size, on levels that are denser near zero.

A table E of V tokens and width H is stored as `qweight` [V, H] int8 (−127…127), `scales` [V, 1] float32 and `column_scales`
[H] float32, so that E[v, h] ≈ level(qweight[v, h]) · scales[v] · column_scales[h], where level(q) = q · (0.4 + 0.6 ·
(q/127)²).

Some channels of a trained table are larger than others in every row and would determine the step of all of them, so each
column is first divided by its root mean square. Most values of a row are small compared with its largest: on equidistant
levels a row of normal values loses 0.8 to 1.2%, and one with outliers 1.5%, whatever its scale. With levels 5.5 times as dense
at zero as at the ends, each row of the sample, and of normal values at the widths of the 0.6B, the 4B and the 8B, loses less
than 0.8% (0.65% on average; tests/checkpoint/test_int8_table.py). Scales are float32, because in float16 they would be
subnormal or zero for rows near zero; at a width of 1024 the difference is 0.2% of the table.

`quantize` writes such tables, the vLLM plugin creates and reads them, `eval` reads them.
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
SLOPE_AT_ZERO = 0.4
"""The slope of level(q) at zero; of the values tried, the one with which the worst row of the sample loses least."""
MAX_ERROR = 0.0075
RETRY_FACTORS = (1.03, 1.06, 1.1)
BLOCK_ROWS = 2048
"""Rows of a table converted to float32 at a time."""


def column_scales(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Root mean square [H] float32 of each column of a table given in `blocks` [rows, H]; 1 for columns of zeros.

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

    Each value becomes its nearest level. The largest of a row becomes ±127; if the row's error exceeds MAX_ERROR, retry with
    slightly larger scales (RETRY_FACTORS). A row of zeros gets the scale 1.
    """
    import torch

    values = block.float() / columns
    scales = values.abs().amax(1, keepdim=True) / LEVELS
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    qweight = _nearest(values / scales)
    sizes = (values * columns).norm(dim=1)
    lost = _lost(values, qweight, scales, columns)
    hard = torch.nonzero(lost > MAX_ERROR * sizes).flatten()
    for ratio in RETRY_FACTORS if len(hard) else ():
        wider = scales[hard] * ratio
        tried = _nearest(values[hard] / wider)
        less = _lost(values[hard], tried, wider, columns)
        better = less < lost[hard]
        at = hard[better]
        qweight[at], scales[at], lost[at] = tried[better], wider[better], less[better]
    return qweight, scales


def _nearest(values: torch.Tensor) -> torch.Tensor:
    """The integers −127…127 int8 with the levels nearest to `values`."""
    import torch

    grid = level(torch.arange(-LEVELS, LEVELS + 1, device=values.device))
    return torch.bucketize(values, (grid[1:] + grid[:-1]) / 2, out_int32=True).sub_(LEVELS).to(torch.int8)


def _lost(values: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The norm of the error of each row [rows]."""
    return level(qweight).mul_(scales).sub_(values).mul_(columns).norm(dim=1)


def dequantize(qweight: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The rows [..., H] float32 of `qweight` [..., H], `scales` [..., 1] and `columns` [H]."""
    return level(qweight).mul_(scales).mul_(columns)


def level(qweight: torch.Tensor) -> torch.Tensor:
    """The levels of integers −127…127 before scaling: float32 in the same range, same shape."""
    steps = qweight.float()
    return steps.square().mul_((1 - SLOPE_AT_ZERO) / LEVELS**2).add_(SLOPE_AT_ZERO).mul_(steps)
