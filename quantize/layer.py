"""Quantizes a decoder layer, its linear layers in the order in which data flows through them.

The Gram matrix of an input is taken once everything before it is quantized, including earlier linear layers of the same layer,
so that each linear layer is fitted to its real inputs. The steps are the same for each of the four inputs of a layer: correct
the weights that read it, search its scales, fold them into the norm or the linear layer that feeds it, and round.

The correction targets the original model. q/k/v and gate/up, which read a norm, are fitted to their own original outputs;
o_proj and down_proj, which write to the residual stream, to the original hidden states. So each corrects the losses before it,
as far as these are a linear function of its inputs (`correction.correct`). Errors of o_proj and down_proj count relative to the
size of the residual stream that they are added to, because the norms that read it divide by that size.

At the end, what comes near the end of float16's range between v_proj and o_proj, or up_proj and down_proj, is divided by powers
of two, which changes no level (`ranges.safe_divisors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qembed.checkpoint.awq_layout import pack
from qembed.quantize import awq, correction, heap, products, rounding
from qembed.quantize.blocks import INPUTS, Architecture, DecoderLayer
from qembed.quantize.hidden import Moments, OriginalStates, Sample, States, Stream
from qembed.quantize.ranges import MAX_WEIGHT, Ranges, largest_magnitudes, safe_divisors
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

FEEDING_NORMS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
FEEDING_LINEARS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
"""The norm or the linear layer that feeds each input, and into which the input's scales are folded."""

REPORT_OUTPUTS = 128
"""Maximum number of outputs of a linear layer from which its error is estimated for the report."""


class LayerQuantizer:
    """Quantizes layer `number`, whose `tensors` are float32 and named without the layer's prefix."""

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
        self.ranges = Ranges()

    def run(self, stream: Stream, original: OriginalStates | None) -> dict[str, torch.Tensor]:
        """Quantize the layer, and advance `stream` through the result.

        `self.tensors` then has the INT4 model's values, and `self.ranges` the largest numbers that it computed.

        `original` has the original model's hidden states for the batches of `stream`; None fits each linear layer to its own
        outputs. The states before the layer and after its attention are released after their last use, because memory peaks at
        the end, when down_proj is rounded.

        Returns:
            The layer as stored: `qweight`, `qzeros` and `scales` of each linear layer, everything else in float16.
        """
        import torch

        with torch.no_grad(), self.ranges.watching(self.block):
            self._load()
            middle = self._quantize_attention(stream, original)
            stream.hidden = []
            stream.hidden = self._quantize_mlp(middle, original)
        return self._stored()

    def _quantize_attention(self, stream: Stream, original: OriginalStates | None) -> Stream:
        """Quantize q/k/v and o_proj; returns the hidden states after attention."""
        norm = self.block.module.input_layernorm
        self._quantize(
            "self_attn.q_proj", Moments.by_fold(self._norm_samples(norm, stream, original.before if original else None))
        )
        if original is not None:
            original.before = None
        inputs = self._quantize_residual("self_attn.o_proj", stream, original.middle if original else None)
        return Stream(stream.batches, self._add_output("self_attn.o_proj", stream, inputs), stream.in_half)

    def _quantize_mlp(self, middle: Stream, original: OriginalStates | None) -> States:
        """Quantize gate/up and down_proj; returns the hidden states after the layer."""
        norm = self.block.module.post_attention_layernorm
        self._quantize(
            "mlp.gate_proj", Moments.by_fold(self._norm_samples(norm, middle, original.middle if original else None))
        )
        if original is not None:
            original.middle = None
        inputs = self._quantize_residual("mlp.down_proj", middle, original.after if original else None)
        return self._add_output("mlp.down_proj", middle, inputs)

    def _norm_samples(self, norm: torch.nn.Module, stream: Stream, original: States | None) -> Iterator[Sample]:
        """For each batch the output x of `norm`, and d = x_original − x, or None without `original` states."""
        for number, (batch, hidden) in enumerate(stream):
            x = norm(hidden.to(self.block.device))
            yield batch, x, None if original is None else norm(original[number].to(x.device)) - x

    def _quantize_residual(self, name: str, stream: Stream, original: States | None) -> States:
        """Quantize o_proj or down_proj, and load the layer; returns that linear layer's inputs [B, L, K] for each batch.

        `original` are the original model's hidden states after the linear layer's output is added.
        """
        import torch

        device = self.block.device

        def load_and_read() -> States:
            self._load()
            return stream.inputs_of(name, self.block)

        inputs = load_and_read()
        bias = self.tensors.get(f"{name}.bias")

        def samples() -> Iterator[Sample]:
            for number, (batch, hidden) in enumerate(stream):
                x = inputs[number].to(device)
                if original is None:
                    yield batch.relative_to(hidden), x, None
                    continue
                goal = original[number]
                output = (goal - hidden).to(device)
                yield batch.relative_to(goal), x, output if bias is None else output - bias

        largest = torch.stack([largest_magnitudes(x) for x in inputs]).amax(0).to(device)
        divisors = self._quantize(name, Moments.by_fold(samples()), largest)
        outputs, feeding = self.ranges.outputs, FEEDING_LINEARS[name]
        if divisors is None:
            del outputs[feeding]
            return load_and_read()
        outputs[feeding] = outputs[feeding] / output_divisors(name, divisors, self.shape)
        self._load()
        for number, x in enumerate(inputs):
            inputs[number] = x.div_(divisors.to(x.device))
        return inputs

    def _add_output(self, name: str, stream: Stream, inputs: States) -> States:
        """The hidden states of `stream` plus the output of the loaded linear layer `name` for `inputs`."""
        hidden = stream.plus_output(name, self.block, inputs)
        self.ranges.see_residual(hidden)
        return hidden

    def _quantize(self, name: str, folds: list[Moments], largest: torch.Tensor | None = None) -> torch.Tensor | None:
        """Quantize the linear layers that read the input `name` (one of INPUTS), given the moments of each fold.

        Empties `folds` to free memory. `largest` are the largest magnitudes [K] of the input; None: a norm feeds it.

        Returns:
            The scales [K] by which the input is now divided, if the division is exact; None if it must be computed again.
        """
        heap.trim()
        shrinkage = self._cross_validate(name, folds) if folds[0].cross is not None else None
        moments = Moments.merge(folds)
        if shrinkage is not None:
            self._correct(name, moments, shrinkage)
        gram = moments.gram
        del moments
        inverse = rounding.Inverse.of(gram) if self.settings.rounding == "gptq" else None
        divisors, exact = gram.new_ones(len(gram)), True
        if self.settings.scales == "awq":
            divisors, exact = self._scale(name, gram, inverse)
            gram = gram / (divisors[:, None] * divisors[None])
            inverse = inverse.scaled(divisors) if inverse is not None else None
        self._round(name, gram, inverse)
        if largest is not None:
            powers, exact_powers = self._make_safe(name, largest / divisors, divisors)
            divisors, exact = divisors * powers, exact and exact_powers
        return divisors if exact else None

    def _cross_validate(self, name: str, folds: list[Moments]) -> correction.Shrinkage:
        """How far the weights that read the input `name` should move towards the original model."""
        import torch

        return correction.cross_validate(torch.cat(self._weights(name)), folds, name in FEEDING_NORMS)

    def _correct(self, name: str, moments: Moments, shrinkage: correction.Shrinkage) -> None:
        """Move the weights that read the input `name` towards the original model."""
        import torch

        weights = self._weights(name)
        corrected = correction.correct(torch.cat(weights), moments, shrinkage, name in FEEDING_NORMS)
        for linear, weight in zip(INPUTS[name], corrected.split([len(weight) for weight in weights]), strict=True):
            self.tensors[f"{linear}.weight"] = weight

    def _scale(self, name: str, gram: torch.Tensor, inverse: rounding.Inverse | None) -> tuple[torch.Tensor, bool]:
        """Search the scales of the input `name` and fold them; returns what `_fold` does. Without GPTQ, `inverse` is None."""
        scales = awq.search_scales(
            self._weights(name),
            gram,
            self.settings.group_size,
            channel_sources(name, self.shape, gram.device),
            inverse.remaining_variance() if inverse is not None else None,
        )
        return self._fold(name, scales if name in FEEDING_NORMS else awq.powers_of_two(scales))

    def _round(self, name: str, gram: torch.Tensor, inverse: rounding.Inverse | None) -> None:
        """Round the weights that read the input `name`: by GPTQ with `inverse`, to nearest if it is None."""
        import torch

        weights = self._weights(name)
        search = awq.search_clip if self.settings.clip else _unclipped
        grids = [search(weight, gram, self.settings.group_size) for weight in weights]
        if inverse is not None:
            stacked, grid = rounding.round_and_refit(torch.cat(weights), gram, inverse, awq.Grid.stack(grids))
            sizes = [len(weight) for weight in weights]
            all_levels, grids = stacked.split(sizes), grid.split(sizes)
        else:
            all_levels = tuple(grid.quantize(weight) for grid, weight in zip(grids, weights, strict=True))
        for linear, weight, grid, levels in zip(INPUTS[name], weights, grids, all_levels, strict=True):
            rounded = grid.dequantize(levels)
            self.report.error[linear].append(_relative_error(rounded, weight, gram))
            self.levels[linear] = levels.to(torch.uint8), grid
            self.tensors[f"{linear}.weight"] = rounded

    def _make_safe(self, name: str, largest: torch.Tensor, divisors: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Divide the input `name`, whose weights are rounded, by powers of two so that float16 can hold it; levels stay.

        `largest` are the input's largest magnitudes [K]. What feeds it can be larger, and is divided by `divisors` [K] since it
        was recorded. Returns what `_fold` does.
        """
        import torch

        feeding, group_size = FEEDING_LINEARS[name], self.settings.group_size
        sources = feeding_outputs(name, self.shape, largest.device)
        powers = safe_divisors(largest.maximum(self.ranges.outputs[feeding][sources] / divisors), group_size, sources)
        levels, grid = self.levels[name]
        grid = awq.Grid(grid.scale * powers[::group_size], grid.zero_point, group_size)
        if (powers == 1).all() or grid.scale.max() * awq.MAX_LEVEL > MAX_WEIGHT:
            return torch.ones_like(powers), True
        self.levels[name] = levels, grid
        self.ranges.scaled[feeding] = powers.max().item()
        return self._fold(name, powers)

    def _load(self) -> None:
        """Load the layer as it is now, to compute the calibration's states."""
        self.block.load(self.tensors, self.number, products.calibration_dtype(self.block.device))

    def _weights(self, name: str) -> list[torch.Tensor]:
        """The weights [N_i, K] that read the input `name`."""
        return [self.tensors[f"{linear}.weight"] for linear in INPUTS[name]]

    def _fold(self, name: str, scales: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Fold `scales` of the input `name` into the layers; a feeding linear layer that is already quantized keeps its levels.

        Returns:
            The scales that were folded, and whether the input is now exactly what it was, divided by them.
        """
        import torch

        feeding = FEEDING_LINEARS.get(name)
        bias = self.tensors.get(f"{feeding}.bias")
        folded = fold_scales(self.tensors, name, scales, self.shape)
        if feeding not in self.levels:
            return folded, False
        levels, grid = self.levels[feeding]
        divisors = output_divisors(name, folded, self.shape)
        divided = grid.divide_rows(divisors)
        exact = torch.equal(divided.scale * divisors[:, None], grid.scale)
        self.levels[feeding] = levels, divided
        self.tensors[f"{feeding}.weight"] = divided.dequantize(levels)
        if bias is not None:
            stored_bias = half(f"{feeding}.bias", self.tensors[f"{feeding}.bias"]).float()
            self.tensors[f"{feeding}.bias"] = stored_bias
            exact = exact and torch.equal(stored_bias * divisors, bias)
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
    """The root mean square output error of `rounded` [N, K], relative to the output of `weight`, on REPORT_OUTPUTS rows."""
    rows = slice(None, None, -(-len(weight) // REPORT_OUTPUTS))
    error, output = awq.output_error(rounded[rows] - weight[rows], gram), awq.output_error(weight[rows], gram)
    return (error / output).clamp(min=0).sqrt().item()


def channel_sources(name: str, shape: Architecture, device: torch.device) -> torch.Tensor | None:
    """For each channel of the input `name` [K] int64, the output of the linear layer that feeds it; None if a norm does."""
    return None if name in FEEDING_NORMS else feeding_outputs(name, shape, device)


def feeding_outputs(name: str, shape: Architecture, device: torch.device) -> torch.Tensor:
    """For each channel of the input `name` [K] int64, the output of the linear layer that feeds it."""
    import torch

    if name == "mlp.down_proj":
        return torch.arange(shape.mlp, device=device)
    outputs = torch.arange(shape.kv_heads * shape.head_dim, device=device).view(shape.kv_heads, 1, shape.head_dim)
    return outputs.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def output_divisors(name: str, scales: torch.Tensor, shape: Architecture) -> torch.Tensor:
    """The divisor [N] of each output of the linear layer that feeds the input `name`, from the input's `scales` [K].

    The heads that share a key-value head have the same scales.
    """
    import torch

    divisors = torch.ones(shape.linear(FEEDING_LINEARS[name])[0], device=scales.device)
    divisors[feeding_outputs(name, shape, scales.device)] = scales
    return divisors


def fold_scales(tensors: dict[str, torch.Tensor], name: str, scales: torch.Tensor, shape: Architecture) -> torch.Tensor:
    """Multiply the linear layers in `tensors` that read the input `name` by `scales` [K], and divide what feeds them.

    A norm's weight is stored in float16, so its scales are adjusted to the quotient of the original and the rounded weight:
    folding then changes the layer's output by float32 rounding only.

    Returns:
        The adjusted scales.
    """
    import torch

    if name in FEEDING_NORMS:
        norm = f"{FEEDING_NORMS[name]}.weight"
        weight = tensors[norm]
        divided = (weight / scales).to(torch.float16).float()
        usable = (divided != 0) & torch.isfinite(divided)
        tensors[norm] = torch.where(usable, divided, weight)
        scales = torch.where(usable, weight / divided, 1.0)
    else:
        divisors = output_divisors(name, scales, shape)
        feeding = FEEDING_LINEARS[name]
        tensors[f"{feeding}.weight"] = tensors[f"{feeding}.weight"] / divisors[:, None]
        if (bias := f"{feeding}.bias") in tensors:
            tensors[bias] = tensors[bias] / divisors
    for linear in INPUTS[name]:
        tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * scales
    return scales


def _unclipped(weight: torch.Tensor, _gram: torch.Tensor, group_size: int) -> awq.Grid:
    return awq.range_grid(weight, group_size)
