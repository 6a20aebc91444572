"""Quantizes one layer, its linears in the order of the data flow.

Moments of an input are summed when everything before it is already quantized, including the linears of the same layer, so
each linear is fitted to the inputs that it gets in the INT4 model. The steps are the same for the inputs of q/k/v, o_proj,
gate/up and down_proj: correct the weights, search scales, fold them into what feeds the input, search clipping, round.

The target is the original model: q/k/v and gate/up aim at their outputs there; o_proj and down_proj, which write to the
residual stream, aim at its hidden states there. So each linear undoes the part of the accumulated error that is a linear
function of its inputs (`correction.corrected`). Errors of o_proj and down_proj count relative to the size of the residual
stream that they are added to, because the norms that read it divide by that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qembed.checkpoint.awq_layout import pack
from qembed.quantize import awq, correction, rounding
from qembed.quantize.batches import Batch
from qembed.quantize.blocks import INPUTS, Architecture, DecoderLayer
from qembed.quantize.hidden import Moments, OriginalStates, Stream
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

NORMS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
FEEDS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
"""Where the scales of an input are folded into: the weight of a norm, or the outputs of a linear."""

REPORTED = 128
"""Outputs of a linear that the reported error is estimated on."""


class LayerQuantizer:
    """Quantizes layer `number` with the given `tensors` (float32, named without the layer's prefix)."""

    def __init__(
        self,
        block: DecoderLayer,
        number: int,
        tensors: Mapping[str, torch.Tensor],
        shape: Architecture,
        settings: QuantizationSettings,
        report: Report,
    ) -> None:
        self.block, self.number, self.shape, self.settings, self.report = block, number, shape, settings, report
        self.tensors = dict(tensors)
        self.levels: dict[str, tuple[torch.Tensor, awq.Grid]] = {}

    def run(self, stream: Stream, goal: OriginalStates | None) -> dict[str, torch.Tensor]:
        """Quantize the layer and advance `stream` through it; `self.tensors` become the weights of the INT4 model.

        Args:
            stream: hidden states before the layer; afterwards those behind it.
            goal: the original model's states at the same places, to correct towards; None targets each linear's own outputs.
                Its `before` and `middle` are cleared once used, because the memory peak comes at the end, at down_proj.

        Returns:
            The stored layer: `qweight`, `qzeros` and `scales` of each linear, everything else in float16.
        """
        import torch

        block, device = self.block, self.block.device
        with torch.no_grad():
            block.load(self.tensors, self.number)
            norm = block.module.input_layernorm
            self._quantize("self_attn.q_proj", Moments.by_fold(self._normed(norm, stream, goal.before if goal else None)))
            if goal:
                goal.before.clear()
            read = self._read("self_attn.o_proj", stream, goal.middle if goal else None)
            o_proj = block.linear("self_attn.o_proj")
            half_way = Stream(
                stream.batches, [h + o_proj(x.to(device)).to(h.device) for h, x in zip(stream.hidden, read, strict=True)]
            )
            del read
            stream.hidden = []
            norm = block.module.post_attention_layernorm
            self._quantize("mlp.gate_proj", Moments.by_fold(self._normed(norm, half_way, goal.middle if goal else None)))
            if goal:
                goal.middle.clear()
            read = self._read("mlp.down_proj", half_way, goal.after if goal else None)
            down_proj = block.linear("mlp.down_proj")
            stream.hidden = [h + down_proj(x.to(device)).to(h.device) for h, x in zip(half_way.hidden, read, strict=True)]
        return self._stored()

    def _normed(
        self, norm: torch.nn.Module, stream: Stream, original: list[torch.Tensor] | None
    ) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor | None]]:
        """Outputs of a norm, and their drift: its outputs in the original model less those here."""
        for number, (batch, hidden) in enumerate(stream):
            x = norm(hidden.to(self.block.device))
            yield batch, x, None if original is None else norm(original[number].to(x.device)) - x

    def _read(self, name: str, stream: Stream, original: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """Quantize o_proj or down_proj and load the layer; returns the inputs of that linear [B, L, K] by batch."""
        device = self.block.device

        def inputs() -> list[torch.Tensor]:
            self.block.load(self.tensors, self.number)
            return [self.block.read_by(name, h.to(device), batch).to(h.device) for batch, h in stream]

        read = inputs()
        bias = self.tensors.get(f"{name}.bias")

        def wanted() -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor | None]]:
            for number, (batch, hidden) in enumerate(stream):
                output = None if original is None else (original[number] - hidden).to(device)
                residual = hidden if original is None else original[number]
                relative = batch.relative_to(residual)
                yield relative, read[number].to(device), output if output is None or bias is None else output - bias

        folded = self._quantize(name, Moments.by_fold(wanted()))
        if folded is None:
            return inputs()
        self.block.load(self.tensors, self.number)
        for x in read:
            x.div_(folded.to(x.device))
        return read

    def _quantize(self, name: str, folds: list[Moments]) -> torch.Tensor | None:
        """Quantize the linears that read the input `name` (one of INPUTS), given its moments by fold.

        Returns:
            The scales [K] that the input is divided by from now on; None if rounding makes that inexact, so that the input must
            be computed again.
        """
        import torch

        settings, members = self.settings, INPUTS[name]
        if folds[0].cross is not None:
            stacked = torch.cat([self.tensors[f"{member}.weight"] for member in members])
            sizes = [len(self.tensors[f"{member}.weight"]) for member in members]
            moved = correction.corrected(stacked, folds, name in NORMS)
            for member, weight in zip(members, moved.split(sizes), strict=True):
                self.tensors[f"{member}.weight"] = weight
        gram, compensate = Moments.total(folds).gram, settings.rounding == "gptq"
        folds.clear()
        inverse = rounding.Inverse.of(gram) if compensate else None
        folded: torch.Tensor | None = gram.new_ones(len(gram))
        if settings.scales == "awq":
            scales = awq.search_scales(
                [self.tensors[f"{member}.weight"] for member in members],
                gram,
                settings.group_size,
                fed_by(name, self.shape, gram.device),
                inverse.remaining_variance() if compensate and inverse is not None else None,
            )
            scales, exact = self._fold(name, scales if name in NORMS else awq.powers_of_two(scales))
            folded = scales if exact else None
            gram = gram / (scales[:, None] * scales[None])
            inverse = inverse.scaled(scales) if inverse is not None else None
        weights = [self.tensors[f"{member}.weight"] for member in members]
        grids = [(awq.search_clip if settings.clip else _whole_range)(weight, gram, settings.group_size) for weight in weights]
        if compensate and inverse is not None:
            whole, grid = rounding.rounded(torch.cat(weights), gram, inverse, awq.Grid.stacked(grids))
            sizes = [len(weight) for weight in weights]
            found, grids = whole.split(sizes), grid.split(sizes)
        else:
            found = tuple(grid.quantize(weight) for grid, weight in zip(grids, weights, strict=True))
        for member, weight, grid, levels in zip(members, weights, grids, found, strict=True):
            rounded = grid.dequantize(levels)
            self.report.error[member].append(_relative_error(rounded, weight, gram))
            self.levels[member] = levels, grid
            self.tensors[f"{member}.weight"] = rounded
        return folded

    def _fold(self, name: str, scales: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Fold `scales` into what feeds the input; returns the scales actually folded, and whether that was exact."""
        import torch

        feeding = FEEDS.get(name)
        bias = self.tensors.get(f"{feeding}.bias")
        folded = fold(self.tensors, name, scales, self.shape)
        if feeding not in self.levels:
            return folded, False
        levels, grid = self.levels[feeding]
        outputs = per_output(name, folded, self.shape)
        divided = grid.divided(outputs)
        exact = torch.equal(divided.scale * outputs[:, None], grid.scale)
        self.levels[feeding] = levels, divided
        self.tensors[f"{feeding}.weight"] = divided.dequantize(levels)
        if bias is not None:
            kept = half(f"{feeding}.bias", self.tensors[f"{feeding}.bias"]).float()
            self.tensors[f"{feeding}.bias"] = kept
            exact = exact and torch.equal(kept * outputs, bias)
        return folded, exact

    def _stored(self) -> dict[str, torch.Tensor]:
        import torch

        stored: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            linear = name.removesuffix(".weight")
            if linear not in self.levels:
                stored[name] = half(name, tensor)
                continue
            levels, grid = self.levels[linear]
            stored[f"{linear}.qweight"] = pack(levels.T)
            stored[f"{linear}.qzeros"] = pack(grid.zero_point.T)
            stored[f"{linear}.scales"] = grid.scale.T.to(torch.float16).contiguous()
        return stored


def _relative_error(rounded: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Root mean square output error of `rounded` [N, K] relative to the output, on at most REPORTED evenly spaced outputs."""
    some = slice(None, None, -(-len(weight) // REPORTED))
    lost, whole = awq.output_error(rounded[some] - weight[some], gram), awq.output_error(weight[some], gram)
    return (lost / whole).clamp(min=0).sqrt().item()


def fed_by(name: str, shape: Architecture, device: torch.device) -> torch.Tensor | None:
    """For each channel [K] int64 of the input `name`, the output of the linear that feeds it; None if a norm feeds it."""
    import torch

    if name in NORMS:
        return None
    if name == "mlp.down_proj":
        return torch.arange(shape.mlp, device=device)
    outputs = torch.arange(shape.kv_heads * shape.head_dim, device=device).view(shape.kv_heads, 1, shape.head_dim)
    return outputs.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def per_output(name: str, scales: torch.Tensor, shape: Architecture) -> torch.Tensor:
    """The `scales` [K] of the input `name` by output [N] of the linear that feeds it; grouped heads share scales."""
    import torch

    outputs = torch.ones(shape.linear(FEEDS[name])[0], device=scales.device)
    outputs[fed_by(name, shape, scales.device)] = scales
    return outputs


def fold(tensors: dict[str, torch.Tensor], name: str, scales: torch.Tensor, shape: Architecture) -> torch.Tensor:
    """In `tensors`, multiply the linears that read the input `name` by `scales` [K] and divide what feeds the input.

    A norm's weight is stored as float16, so its scales are adjusted to the exact quotient of the rounded weights: folding then
    changes the layer's output by float32 rounding only.

    Returns:
        The scales folded in.
    """
    import torch

    if name in NORMS:
        norm = f"{NORMS[name]}.weight"
        weight = tensors[norm]
        divided = (weight / scales).to(torch.float16).float()
        exact = (divided != 0) & torch.isfinite(divided)
        tensors[norm] = torch.where(exact, divided, weight)
        scales = torch.where(exact, weight / divided, 1.0)
    else:
        outputs = per_output(name, scales, shape)
        feeding = FEEDS[name]
        tensors[f"{feeding}.weight"] = tensors[f"{feeding}.weight"] / outputs[:, None]
        if (bias := f"{feeding}.bias") in tensors:
            tensors[bias] = tensors[bias] / outputs
    for member in INPUTS[name]:
        tensors[f"{member}.weight"] = tensors[f"{member}.weight"] * scales
    return scales


def _whole_range(weight: torch.Tensor, _gram: torch.Tensor, group_size: int) -> awq.Grid:
    return awq.range_grid(weight, group_size)
