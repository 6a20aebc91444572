"""One layer, its linears in the order in which data flows through them.

Each input's Gram matrix is taken when everything before it is quantized already, inside the layer too, so that each linear is
fitted to the inputs that it will really get. Four times the same steps: what reads this input, its scales, the scales folded
into what feeds it, the integers.

What the linears aim at is the original model: those behind a norm at the outputs that they have there, o_proj and down_proj,
which write to the residual stream, at its hidden states. So each takes back what was lost before it, as far as that depends
linearly on its inputs (`rounding.refitted`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qembed.packing import pack
from qembed.quantize import awq, rounding
from qembed.quantize.batches import Batch
from qembed.quantize.blocks import INPUTS, Block, Shape
from qembed.quantize.hidden import Goal, Moments, Stream
from qembed.quantize.settings import Report, Settings
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

NORMS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
FEEDS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
"""Where the scales of an input are folded in: the weight of the norm, or the outputs of the linear, that it comes from."""


class LayerQuantizer:
    """Quantizes the layer of this number, whose `tensors` (float32, named without the layer's prefix) are given."""

    def __init__(
        self,
        block: Block,
        number: int,
        tensors: Mapping[str, torch.Tensor],
        shape: Shape,
        settings: Settings,
        report: Report,
    ) -> None:
        self.block, self.number, self.shape, self.settings, self.report = block, number, shape, settings, report
        self.tensors = dict(tensors)
        self.levels: dict[str, tuple[torch.Tensor, awq.Grid]] = {}

    def run(self, stream: Stream, goal: Goal | None) -> dict[str, torch.Tensor]:
        """Quantize; afterwards `stream` stands behind the layer and `self.tensors` are what the INT4 model computes with.

        `goal` is what the original model has where `stream` passes; None leaves each linear its own outputs as the target.

        Returns:
            The layer as it is stored: `qweight`, `qzeros` and `scales` of each linear, everything else float16.
        """
        import torch

        block = self.block
        with torch.no_grad():
            block.load(self.tensors, self.number)
            norm = block.module.input_layernorm
            self._quantize("self_attn.q_proj", Moments.of(self._normed(norm, stream, goal.before if goal else None)))
            self._quantize("self_attn.o_proj", Moments.of(self._attention(stream, goal)))
            block.load(self.tensors, self.number)
            middle = [block.attend(h.to(block.device), batch)[1].to(h.device) for batch, h in stream]
            norm = block.module.post_attention_layernorm
            half_way = Stream(stream.batches, middle)
            self._quantize("mlp.gate_proj", Moments.of(self._normed(norm, half_way, goal.middle if goal else None)))
            self._quantize("mlp.down_proj", Moments.of(self._mlp(half_way, goal)))
            block.load(self.tensors, self.number)
            stream.hidden = [block.feed(h.to(block.device))[1].to(h.device) for h in middle]
        return self._stored()

    def _normed(
        self, norm: torch.nn.Module, stream: Stream, original: list[torch.Tensor] | None
    ) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor | None]]:
        """What a norm gives, and how far it has drifted from what it gives in the original model."""
        for number, (batch, hidden) in enumerate(stream):
            x = norm(hidden.to(self.block.device))
            yield batch, x, None if original is None else norm(original[number].to(x.device)) - x

    def _attention(self, stream: Stream, goal: Goal | None) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor | None]]:
        self.block.load(self.tensors, self.number)
        for number, (batch, hidden) in enumerate(stream):
            x, after = self.block.attend(hidden.to(self.block.device), batch)
            yield batch, x, None if goal is None else goal.middle[number].to(x.device) - after

    def _mlp(self, middle: Stream, goal: Goal | None) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor | None]]:
        self.block.load(self.tensors, self.number)
        for number, (batch, hidden) in enumerate(middle):
            x, after = self.block.feed(hidden.to(self.block.device))
            yield batch, x, None if goal is None else goal.after[number].to(x.device) - after

    def _quantize(self, name: str, moments: Moments) -> None:
        """Quantize the linears that read the input `name` (one of INPUTS), whose moments are given."""
        settings, members = self.settings, INPUTS[name]
        gram, compensate = moments.gram, settings.rounding == "compensated"
        inverse = rounding.Inverse.of(gram) if compensate or moments.cross is not None else None
        if moments.cross is not None and inverse is not None:
            for member in members:
                weight = self.tensors[f"{member}.weight"]
                cross = weight @ moments.cross if name in NORMS else moments.cross
                self.tensors[f"{member}.weight"] = rounding.refitted(weight, inverse, cross)
        if settings.scales == "awq":
            scales = awq.search_scales(
                [self.tensors[f"{member}.weight"] for member in members],
                gram,
                settings.group_size,
                fed_by(name, self.shape, gram.device),
                inverse.remaining_variance() if compensate and inverse is not None else None,
            )
            scales = self._fold(name, scales)
            gram = gram / (scales[:, None] * scales[None])
            inverse = inverse.scaled(scales) if inverse is not None else None
        for member in members:
            weight = self.tensors[f"{member}.weight"]
            search = awq.search_clip if settings.clip else _whole_range
            grid = search(weight, gram, settings.group_size)
            if compensate and inverse is not None:
                levels = rounding.compensated(weight, inverse, grid)
            else:
                levels = grid.quantize(weight)
            rounded = grid.dequantize(levels)
            lost, whole = awq.output_error(rounded - weight, gram), awq.output_error(weight, gram)
            self.report.error[member].append((lost / whole).clamp(min=0).sqrt().item())
            self.levels[member] = levels, grid
            self.tensors[f"{member}.weight"] = rounded

    def _fold(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """Fold `scales` in where the input comes from; returns those that were folded in."""
        folded = fold(self.tensors, name, scales, self.shape)
        feeding = FEEDS.get(name)
        if feeding in self.levels:
            levels, grid = self.levels[feeding]
            grid = grid.divided(per_output(name, folded, self.shape))
            self.levels[feeding] = levels, grid
            self.tensors[f"{feeding}.weight"] = grid.dequantize(levels)
            if (bias := f"{feeding}.bias") in self.tensors:
                self.tensors[bias] = half(bias, self.tensors[bias]).float()
        return folded

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


def fed_by(name: str, shape: Shape, device: torch.device) -> torch.Tensor | None:
    """For each channel of the input `name` [K] int64, the output of the linear that feeds it; None where a norm does."""
    import torch

    if name in NORMS:
        return None
    if name == "mlp.down_proj":
        return torch.arange(shape.mlp, device=device)
    outputs = torch.arange(shape.kv_heads * shape.head_dim, device=device).view(shape.kv_heads, 1, shape.head_dim)
    return outputs.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def per_output(name: str, scales: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The `scales` [K] of the input `name`, one for each output [N] of the linear that feeds it; grouped heads share theirs."""
    import torch

    outputs = torch.ones(shape.linear(FEEDS[name])[0], device=scales.device)
    outputs[fed_by(name, shape, scales.device)] = scales
    return outputs


def fold(tensors: dict[str, torch.Tensor], name: str, scales: torch.Tensor, shape: Shape) -> torch.Tensor:
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
