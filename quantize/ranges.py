"""The largest numbers that a layer computes, and the powers of two that keep them within the range of float16.

Qwen3-Embedding-8B has inputs of down_proj beyond float16's largest number, 65,504, so that its vectors are NaN in float16. A
linear layer's outputs may be divided by a power of two, if the one that reads them multiplies: up_proj and down_proj, v_proj
and o_proj. All products stay the same but for their exponents. Channels of a group share their power, and so do the heads that
share a key-value head; so the integers of INT4 stay the same too, and only scales are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qembed.quantize.blocks import LINEARS, DecoderLayer

if TYPE_CHECKING:
    import torch

SCALED_TO = 2.0**13
"""What exceeds this number is scaled down to it, so that texts unlike the calibration may have numbers 8 times as large."""
MAX_WEIGHT = 2.0**15
"""Weights are not multiplied beyond this number, half of the range of float16."""
MAX_EXPONENT = 24
"""Of the power of two: the smallest number of float16 is 2⁻²⁴."""
LARGEST_FLOAT32 = 3.4e38


class Ranges:
    """The largest magnitudes in one layer, of every position that was computed.

    Attributes:
        inputs: for each linear layer [K], by channel.
        outputs: for each linear layer [N], by channel.
        residual: of the residual stream after attention and after the layer.
        scaled: the largest power of two by which outputs of a linear layer were divided, where that is not 1.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.residual = 0.0
        self.scaled: dict[str, float] = {}

    @contextmanager
    def watching(self, block: DecoderLayer) -> Iterator[None]:
        """Inside the block, record the inputs and outputs of all linear layers of `block` that are computed."""

        def hook(name: str) -> Any:
            def see(_module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                for largest, values in ((self.inputs, inputs[0]), (self.outputs, output)):
                    magnitude = largest_magnitudes(values)
                    largest[name] = magnitude if name not in largest else largest[name].maximum(magnitude)

            return see

        handles = [block.linear(name).register_forward_hook(hook(name)) for name in LINEARS]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def see_residual(self, hidden: Iterable[torch.Tensor]) -> None:
        """Record the residual stream `hidden` [B, L, hidden] of each batch."""
        self.residual = max(self.residual, *(_number(states.abs().max()) for states in hidden))

    def record(self) -> dict[str, Any]:
        """The largest magnitudes of whole linear layers, as JSON types: "linears" (input, output), "residual" and "scaled"."""
        return {
            "linears": {
                name: [_number(self.inputs[name].max()), _number(self.outputs[name].max())]
                for name in LINEARS
                if name in self.inputs
            },
            "residual": self.residual,
            "scaled": dict(self.scaled),
        }


def largest_magnitudes(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude [K] float32 of each channel of `values` [..., K]."""
    import torch

    rows = values.detach().flatten(0, -2)
    if (
        rows.dtype == torch.bfloat16
    ):  # without their sign, the bits have the order of the numbers; torch compares integers faster
        return (rows.view(torch.int16) & 0x7FFF).amax(0).view(torch.bfloat16).float()
    return rows.abs().amax(0).float()


def safe_divisors(largest: torch.Tensor, group_size: int, sources: torch.Tensor) -> torch.Tensor:
    """Powers of two [K] by which to divide an input whose channels have these `largest` magnitudes [K]; 1 where none is needed.

    All channels of a group get the same power, and so do channels with the same number in `sources` [K] int64 (as from
    `layer.channel_sources`).
    """
    exponents = (largest / SCALED_TO).log2().ceil().nan_to_num(0.0).clamp(0, MAX_EXPONENT)
    while True:
        shared = exponents.unflatten(0, (-1, group_size)).amax(1).repeat_interleave(group_size)
        of_source = shared.new_zeros(int(sources.max()) + 1).scatter_reduce(0, sources, shared, "amax")
        if (of_source[sources] == exponents).all():
            return exponents.exp2()
        exponents = of_source[sources]


def _number(largest: torch.Tensor) -> float:
    """`largest` with four significant digits, and always finite: JSON has no other numbers."""
    return float(f"{largest.nan_to_num(LARGEST_FLOAT32, posinf=LARGEST_FLOAT32).item():.4g}")
