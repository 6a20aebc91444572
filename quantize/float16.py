"""Whether the INT4 model can be computed in float16: layers of another quantizer are made safe, and what cannot be is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.float16 import LARGEST, OVERFLOWS
from qembed.quantize.awq import MAX_LEVEL, SMALLEST_HALF
from qembed.quantize.blocks import Architecture, DecoderLayer
from qembed.quantize.hidden import Stream
from qembed.quantize.layer import FEEDING_LINEARS, feeding_outputs, output_divisors
from qembed.quantize.ranges import MAX_WEIGHT, Ranges, safe_divisors
from qembed.quantize.settings import Report

if TYPE_CHECKING:
    import torch

TOO_NEAR = LARGEST / 2
"""What cannot be scaled and exceeds this number is told: other texts may have numbers twice as large."""


def measure(stream: Stream, block: DecoderLayer) -> Ranges:
    """Advance `stream` through the layer that `block` holds; returns the largest numbers that it computes."""
    ranges = Ranges()
    with ranges.watching(block):
        ranges.see_residual(stream.advance(block))
    ranges.see_residual(stream.hidden)
    return ranges


def scale_down(
    stored: Mapping[str, torch.Tensor], ranges: Ranges, shape: Architecture, group_size: int
) -> dict[str, torch.Tensor] | None:
    """The `stored` tensors of a layer, scaled so that what `ranges` has between its linear layers keeps within float16.

    Integers stay, and scales and biases change by powers of two. The linear layers are noted in `ranges.scaled`.

    Returns:
        All tensors of the layer, or None if nothing has to change.
    """
    import torch

    tensors = dict(stored)
    for name, feeding in FEEDING_LINEARS.items():
        scales, feeding_scales = tensors[f"{name}.scales"], tensors[f"{feeding}.scales"]
        sources = feeding_outputs(name, shape, scales.device)
        largest = ranges.inputs[name].maximum(ranges.outputs[feeding][sources]).to(scales.device)
        divisors = safe_divisors(largest, group_size, sources)
        scaled = scales.float() * divisors[::group_size, None]
        if (power := divisors.max().item()) == 1 or scaled.max() * MAX_LEVEL > MAX_WEIGHT:
            continue
        by_output = output_divisors(name, divisors, shape)
        tensors[f"{name}.scales"] = scaled.to(torch.float16)
        tensors[f"{feeding}.scales"] = (feeding_scales.float() / by_output).clamp(min=SMALLEST_HALF).to(torch.float16)
        if (bias := f"{feeding}.bias") in tensors:
            tensors[bias] = (tensors[bias].float() / by_output).to(torch.float16)
        ranges.scaled[feeding] = power
    return tensors if ranges.scaled else None


def overflows(report: Report) -> list[str]:
    """What is larger than TOO_NEAR, one text for the residual stream and for each kind of linear layer; empty if nothing is."""
    values: dict[str, list[float]] = {"the residual stream": report.residual}
    for name, pairs in report.largest.items():
        values[f"the input of {name}"] = [pair[0] for pair in pairs]
        values[f"the output of {name}"] = [pair[1] for pair in pairs]
    return [
        f"{place} reaches {max(layers):,.0f} in layer {layers.index(max(layers))}"
        for place, layers in values.items()
        if max(layers, default=0.0) > TOO_NEAR
    ]


def record(report: Report) -> dict[str, Any]:
    """The manifest's field (JSON types): what cannot be computed in float16, what was scaled, and all largest magnitudes."""
    return {
        OVERFLOWS: overflows(report),
        "scaled": report.scaled,
        "largest": {
            name: {"input": [pair[0] for pair in pairs], "output": [pair[1] for pair in pairs]}
            for name, pairs in report.largest.items()
        }
        | {"residual": report.residual},
    }
