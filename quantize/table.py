"""Converts the token table for the output checkpoint, and extracts the rows that calibration looks up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qembed.checkpoint import int8_table
from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.quantize.parts import Blocks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rows:
    """Selected rows of a token table: `values` [n, hidden] of the token `ids` [n] int64, in ascending order."""

    ids: torch.Tensor
    values: torch.Tensor

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [..., hidden] of `ids` [...]; every id must be among `self.ids`."""
        import torch

        return self.values[torch.searchsorted(self.ids, ids)]


@dataclass(frozen=True)
class Converted:
    """A converted token table.

    Attributes:
        tensors: the tensors to store, by name.
        original: the rows that calibration needs, from the float16 table.
        served: the same rows as a server of `tensors` looks them up.
        error: relative error ‖E − Ê‖ / ‖E‖ of the table; None if the conversion is lossless.
    """

    tensors: Mapping[str, torch.Tensor | Blocks]
    original: Rows
    served: Rows
    error: float | None


def convert(checkpoint: Checkpoint, name: str, ids: Sequence[int], kind: str) -> Converted:
    """Convert the token table `name` of `checkpoint` to `kind` ("float16" or "int8"); extract the rows of `ids` (ascending).

    Reads the source in blocks of rows, so the float16 table is never held in memory at once.

    Raises:
        BadInput: the tensor is missing, damaged, not finite, or exceeds the range of float16.
    """
    import torch

    row_ids, table = torch.tensor(ids), in_blocks(checkpoint, name)
    blocks = table.rows
    if kind != int8_table.INT8:
        rows = Rows(row_ids, gather(blocks(), row_ids))
        return Converted({name: table}, rows, rows, None)
    column_scales = int8_table.column_scales(blocks())
    count, width = table.shape
    qweight, scales = torch.empty(count, width, dtype=torch.int8), torch.empty(count, 1)
    original, start, squared_error, squared_norm = [], 0, 0.0, 0.0
    for block in blocks():
        end = start + len(block)
        qweight[start:end], scales[start:end] = int8_table.quantize(block, column_scales)
        difference = int8_table.dequantize(qweight[start:end], scales[start:end], column_scales).sub_(block)
        squared_error += difference.double().square_().sum().item()
        squared_norm += block.double().square_().sum().item()
        original.append(block[row_ids[(row_ids >= start) & (row_ids < end)] - start])
        start = end
    served = int8_table.dequantize(qweight[row_ids], scales[row_ids], column_scales)
    return Converted(
        int8_tensors(name, qweight, scales, column_scales),
        Rows(row_ids, torch.cat(original)),
        Rows(row_ids, served),
        (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
    )


def gather(blocks: Iterable[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The rows `ids` [n] (ascending) of a matrix that arrives in `blocks` of consecutive rows [rows, columns]."""
    import torch

    rows, start = [], 0
    for block in blocks:
        rows.append(block[ids[(ids >= start) & (ids < start + len(block))] - start])
        start += len(block)
    return torch.cat(rows)


def in_blocks(checkpoint: Checkpoint, name: str) -> Blocks:
    """The matrix `name` of `checkpoint` as float16, in blocks of rows. Reading a block raises BadInput like `half`."""

    def rows() -> Iterator[torch.Tensor]:
        for block in checkpoint.row_blocks(name, int8_table.BLOCK_ROWS):
            yield half(name, block)

    return Blocks(checkpoint.shapes()[name][0], rows)


def int8_tensors(
    name: str, qweight: torch.Tensor, scales: torch.Tensor, column_scales: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors to store for an INT8 table whose name in the source is `name` (….weight).

    They include an empty tensor called `name`. transformers ignores quantization methods that it does not know, and would
    replace a missing table by random numbers; a table of the wrong shape makes it stop with an error.
    """
    import torch

    stem = name.removesuffix("weight")
    tensors = dict(zip(int8_table.TENSORS, (qweight, scales, column_scales), strict=True))
    return {**{stem + suffix: tensor for suffix, tensor in tensors.items()}, name: torch.empty(0, dtype=torch.float16)}


def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as float16; `name` is for the error message.

    Raises:
        BadInput: a value is NaN, infinite, or exceeds the range of float16.
    """
    import torch

    converted = tensor.to(torch.float16)
    if not torch.isfinite(converted).all():
        reason = "is too large for float16" if torch.isfinite(tensor).all() else "is NaN or infinite"
        raise BadInput(f"tensor {name}: a value {reason}")
    return converted
