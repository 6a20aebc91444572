"""One layer, its linears in the order in which data flows through them.

Each input's Gram matrix is taken when everything before it is quantized already, inside the layer too, so that each linear is
fitted to the inputs that it will really get. Four times the same steps: what reads this input, its scales, the scales folded
into what feeds it, the integers.

What the linears aim at is the original model: those behind a norm at the outputs that they have there, o_proj and down_proj,
which write to the residual stream, at its hidden states. So each takes back what was lost before it, as far as that depends
linearly on its inputs (`correction.corrected`). Errors of o_proj and down_proj count relative to the size of the residual
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
"""Where the scales of an input are folded in: the weight of the norm, or the outputs of the linear, that it comes from."""

REPORTED = 128
"""Outputs of a linear from which the report estimates its error."""


class LayerQuantizer:
    """Quantizes the layer of this number, whose `tensors` (float32, named without the layer's prefix) are given."""

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
        """Quantize; afterwards `stream` stands behind the layer and `self.tensors` are what the INT4 model computes with.

        `goal` is what the original model has where `stream` passes; None leaves each linear its own outputs as the target. Its
        hidden states before and in the middle of the layer are let go of as soon as they have served: most is held at the end,
        when down_proj is rounded.

        Returns:
            The layer as it is stored: `qweight`, `qzeros` and `scales` of each linear, everything else float16.
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
        """What a norm gives, and how far it has drifted from what it gives in the original model."""
        for number, (batch, hidden) in enumerate(stream):
            x = norm(hidden.to(self.block.device))
            yield batch, x, None if original is None else norm(original[number].to(x.device)) - x

    def _read(self, name: str, stream: Stream, original: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """Quantize o_proj or down_proj, and load the layer; what that linear then reads of each batch [B, L, K]."""
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
        """Quantize the linears that read the input `name` (one of INPUTS), whose moments are given for each fold.

        Returns:
            The scales [K] that the input is now divided by, if it is that to the last bit; None if it must be computed anew.
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
        """Fold `scales` in where the input comes from; returns those that were folded in, and whether nothing was rounded."""
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
    """The root mean square output error of `rounded` [N, K], of the output's: over REPORTED outputs, evenly spaced, at most."""
    some = slice(None, None, -(-len(weight) // REPORTED))
    lost, whole = awq.output_error(rounded[some] - weight[some], gram), awq.output_error(weight[some], gram)
    return (lost / whole).clamp(min=0).sqrt().item()


def fed_by(name: str, shape: Architecture, device: torch.device) -> torch.Tensor | None:
    """For each channel of the input `name` [K] int64, the output of the linear that feeds it; None where a norm does."""
    import torch

    if name in NORMS:
        return None
    if name == "mlp.down_proj":
        return torch.arange(shape.mlp, device=device)
    outputs = torch.arange(shape.kv_heads * shape.head_dim, device=device).view(shape.kv_heads, 1, shape.head_dim)
    return outputs.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def per_output(name: str, scales: torch.Tensor, shape: Architecture) -> torch.Tensor:
    """The `scales` [K] of the input `name`, one for each output [N] of the linear that feeds it; grouped heads share theirs."""
    import torch

    outputs = torch.ones(shape.linear(FEEDS[name])[0], device=scales.device)
    outputs[fed_by(name, shape, scales.device)] = scales
    return outputs


def fold(tensors: dict[str, torch.Tensor], name: str, scales: torch.Tensor, shape: Architecture) -> torch.Tensor:
    """In `tensors`, multiply the linears that read the input `name` by `scales` [K], and divide what feeds them.

    A norm's weight is stored as float16, so its scales are bent to what the rounded weight really divides by: folding then
    moves the layer's output by nothing but float32 rounding.

    Returns:
        The scales that were folded in.
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
