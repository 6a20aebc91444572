"""The token table of the checkpoint that is written, and the rows of it that calibration looks up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """Some rows of a token table: the `values` [n, hidden] of the token `ids` [n] int64, which ascend."""

    ids: torch.Tensor
    values: torch.Tensor

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [..., hidden] of `ids` [...], all of which must be among ours."""
        import torch

        return self.values[torch.searchsorted(self.ids, ids)]


@dataclass(frozen=True)
class Converted:
    """What is stored of a token table, by tensor name, and the rows that calibration needs.

    `original` are those of the float16 table, `served` those that a server of `tensors` looks up. `error` is the relative
    error ‖E − Ê‖ / ‖E‖ of the whole table; None where nothing is lost.
    """

    tensors: Mapping[str, torch.Tensor | Blocks]
    original: Rows
    served: Rows
    error: float | None


def convert(checkpoint: Checkpoint, name: str, ids: Sequence[int], kind: str) -> Converted:
    """The tensor `name` of `checkpoint` as `kind` ("float16" or "int8"), with the rows of `ids`, which ascend.

    The source is read in blocks of rows, and never held as a whole.

    Raises:
        BadInput: the tensor is missing, damaged, not finite, or greater than float16 holds.
    """
    import torch

    wanted, table = torch.tensor(ids), in_blocks(checkpoint, name)
    blocks = table.rows
    if kind != int8_table.INT8:
        found, start = [], 0
        for block in blocks():
            found.append(block[wanted[(wanted >= start) & (wanted < start + len(block))] - start])
            start += len(block)
        rows = Rows(wanted, torch.cat(found))
        return Converted({name: table}, rows, rows, None)
    columns = int8_table.column_scales(blocks())
    count, width = table.shape
    qweight, scales = torch.empty(count, width, dtype=torch.int8), torch.empty(count, 1)
    original, start, lost, whole = [], 0, 0.0, 0.0
    for block in blocks():
        end = start + len(block)
        qweight[start:end], scales[start:end] = int8_table.quantize(block, columns)
        difference = int8_table.dequantize(qweight[start:end], scales[start:end], columns).sub_(block)
        lost += difference.double().square_().sum().item()
        whole += block.double().square_().sum().item()
        original.append(block[wanted[(wanted >= start) & (wanted < end)] - start])
        start = end
    served = int8_table.dequantize(qweight[wanted], scales[wanted], columns)
    return Converted(
        stored(name, qweight, scales, columns),
        Rows(wanted, torch.cat(original)),
        Rows(wanted, served),
        (lost / whole) ** 0.5 if whole else 0.0,
    )


def in_blocks(checkpoint: Checkpoint, name: str) -> Blocks:
    """The matrix `name` of `checkpoint` as float16, in blocks of rows; reading them raises what `half` does."""

    def rows() -> Iterator[torch.Tensor]:
        for block in checkpoint.row_blocks(name, int8_table.BLOCK_ROWS):
            yield half(name, block)

    return Blocks(checkpoint.shapes()[name][0], rows)


def stored(name: str, qweight: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of an INT8 table that was `name` (….weight) in the source.

    An empty tensor stands under the old name. transformers skips quantization that it does not know, and would fill in a
    table of random numbers where one is missing; at a table of another shape it stops.
    """
    import torch

    stem = name.removesuffix("weight")
    parts = dict(zip(int8_table.TENSORS, (qweight, scales, columns), strict=True))
    return {**{stem + part: tensor for part, tensor in parts.items()}, name: torch.empty(0, dtype=torch.float16)}


def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as float16.

    Raises:
        BadInput: a value is NaN or infinite, or too great for float16.
    """
    import torch

    converted = tensor.to(torch.float16)
    if not torch.isfinite(converted).all():
        reason = "is too great for float16" if torch.isfinite(tensor).all() else "is NaN or infinite"
        raise BadInput(f"tensor {name}: a value {reason}")
    return converted
