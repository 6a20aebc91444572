"""One decoder layer at a time: load, run, collect Gram matrices, quantize, write, forget.

Never more than one layer's weights are in memory. Beside them stand the hidden states of the calibration tokens. They have come
through the layers already quantized, so that each layer is fitted to the inputs that it will really get. A second, smaller
stream of texts that quantization never sees runs through both the original and the quantized layers; where it ends, the two
vectors of each text are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qembed.checkpoint import Checkpoint
from qembed.packing import dequantize, pack
from qembed.quantize import awq, rounding, table
from qembed.quantize.blocks import INPUTS, LINEARS, NOT_STORED, Block, Shape, rms_norm
from qembed.quantize.calibration import Calibration, batches
from qembed.quantize.parts import Parts
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the checkpoint and the calibration.

    Attributes:
        group_size: inputs that share a scale and a zero point.
        scales: "awq" searches a scale per input channel, "none" leaves the weights as they are.
        clip: whether ranges are shrunk by search.
        rounding: "compensated" (GPTQ) or "nearest".
        token_table: "float16", or "int8" (`qembed.token_table`), which only our vLLM plugin reads.
    """

    group_size: int = 128
    scales: str = "awq"
    clip: bool = True
    rounding: str = "compensated"
    token_table: str = "float16"


@dataclass
class Report:
    """What was lost: by kind of linear over all layers, in the vectors of the texts kept apart, and in an INT8 token table."""

    error: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LINEARS})
    cosines: list[float] = field(default_factory=list)
    table_error: float | None = None

    def relative_error(self, name: str) -> float:
        """Root mean square output error of a kind of linear, relative to the root mean square of its output."""
        values = self.error[name]
        return (sum(value**2 for value in values) / len(values)) ** 0.5


@dataclass
class Stream:
    """Hidden states [B, L, hidden] float32 of texts on their way through the layers, and each row's length [B]."""

    hidden: list[torch.Tensor]
    lengths: list[torch.Tensor]

    @classmethod
    def start(cls, rows: torch.Tensor | table.Rows, found: list[tuple[torch.Tensor, torch.Tensor]]) -> Stream:
        """Look up the ids of `found` (`calibration.batches`) in the token table [vocabulary, hidden], or in `rows` of it."""
        return cls([rows[ids].float() for ids, _ in found], [lengths for _, lengths in found])

    def advance(self, block: Block) -> None:
        """Send every batch through the layer that `block` holds."""
        for number, hidden in enumerate(self.hidden):
            self.hidden[number] = block.run(hidden.to(block.device)).to(hidden.device)

    def vectors(self, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Unit vectors [texts, hidden]: the last token of each row after the final norm."""
        import torch

        rows = [
            hidden[torch.arange(len(lengths)), lengths - 1] for hidden, lengths in zip(self.hidden, self.lengths, strict=True)
        ]
        return torch.nn.functional.normalize(rms_norm(torch.cat(rows), weight, epsilon), dim=-1)


def quantize(
    checkpoint: Checkpoint,
    shape: Shape,
    calibration: Calibration,
    settings: Settings,
    device: torch.device,
    parts: Parts | None = None,
    on_layer: Callable[[int], None] = lambda _: None,
) -> Report:
    """Quantize every layer of `checkpoint`, one by one, into `parts`, or only to measure what is lost.

    Parts are "layer-000" … and, first, "rest" (token table, final norm, output head where it is its own). Layers that are
    there already, from a run that was broken off, are run and not made again: what comes after gets the same inputs, bit for
    bit. `on_layer(n)` is called when n layers are done.

    Raises:
        BadInput: a tensor is missing, damaged, not finite, or greater than float16 holds.
    """
    name = checkpoint.prefix + "embed_tokens.weight"
    outside = [other for other in checkpoint.files if ".layers." not in f".{other}" and other != name]
    rest = {other: half(other, checkpoint.tensor(other)) for other in outside}
    apart = sorted(calibration.check)
    seen = [number for number in range(len(calibration.rows)) if number not in calibration.check]
    ids = sorted({0, *(token for row in calibration.rows for token in row)})  # rows are padded with 0
    converted = table.convert(checkpoint, name, ids, settings.token_table)
    if parts is not None and "rest" not in parts:
        parts.write("rest", {**rest, **converted.tensors}, {})
    final_norm = rest[checkpoint.prefix + "norm.weight"].float()
    stream = Stream.start(converted.served, batches(calibration.rows, seen, BATCH_TOKENS))
    check = Stream.start(converted.served, batches(calibration.rows, apart, BATCH_TOKENS))
    original = Stream.start(converted.original, batches(calibration.rows, apart, BATCH_TOKENS))
    report = Report(table_error=converted.error)
    del rest, converted
    block = Block(checkpoint, device)
    for layer in range(shape.layers):
        prefix = f"{checkpoint.prefix}layers.{layer}."
        tensors = {
            name.removeprefix(prefix): half(name, checkpoint.tensor(name)).to(device).float()
            for name in checkpoint.files
            if name.startswith(prefix) and not name.endswith(NOT_STORED)
        }
        block.load(tensors, layer)
        original.advance(block)
        part = f"layer-{layer:03d}"
        finished = None if parts is None else parts.read(part)
        if finished is None:
            grams = collect(block, stream)
            quantized, stored = quantize_layer(tensors, grams, shape, settings, report)
            notes = {name: values[-1] for name, values in report.error.items()}
            if parts is not None:
                parts.write(part, {prefix + name: tensor.cpu() for name, tensor in stored.items()}, notes)
        else:
            quantized = as_computed({name.removeprefix(prefix): tensor.to(device) for name, tensor in finished[0].items()})
            for name, error in finished[1].items():
                report.error[name].append(error)
        block.load(quantized, layer)
        stream.advance(block)
        check.advance(block)
        on_layer(layer + 1)
    epsilon = checkpoint.config.get("rms_norm_eps", 1e-6)
    pairs = original.vectors(final_norm, epsilon), check.vectors(final_norm, epsilon)
    report.cosines = (pairs[0] * pairs[1]).sum(-1).tolist()
    return report


def as_computed(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a layer as its code wants them, all float32, from those stored: packed linears become their `weight`."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            made[f"{linear}.weight"] = dequantize(tensor, stored[f"{linear}.qzeros"], stored[f"{linear}.scales"])
        elif f"{linear}.qweight" not in stored or kind == "bias":
            made[name] = tensor.float()
    return made


def collect(block: Block, stream: Stream) -> dict[str, torch.Tensor]:
    """The Gram matrix [K, K] float32 of what each of INPUTS reads in the layer that `block` holds; padding is left out."""
    grams: dict[str, torch.Tensor] = {}
    kept: torch.Tensor

    def receive(name: str, inputs: torch.Tensor) -> None:
        rows = inputs[kept]
        product = rows.T @ rows
        grams[name] = grams[name].add_(product) if name in grams else product

    with block.inputs_to(receive):
        for hidden, lengths in zip(stream.hidden, stream.lengths, strict=True):
            kept = is_token(lengths, hidden.shape[1]).to(block.device)
            block.run(hidden.to(block.device))
    return grams


def is_token(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """Mask [B, longest]: where a row of `lengths` [B] has a token rather than padding."""
    import torch

    return torch.arange(longest)[None] < lengths[:, None]


def quantize_layer(
    tensors: Mapping[str, torch.Tensor],
    grams: Mapping[str, torch.Tensor],
    shape: Shape,
    settings: Settings,
    report: Report,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Quantize one layer, named as in the checkpoint without the layer's prefix.

    Returns:
        The layer as the INT4 model computes it (float32, to run the next layers' inputs), and as it is stored.
    """
    import torch

    tensors = dict(tensors)
    scales = {name: torch.ones(gram.shape[0], device=gram.device) for name, gram in grams.items()}
    if settings.scales == "awq":
        for name, members in INPUTS.items():
            weights = [tensors[f"{member}.weight"] for member in members]
            fed_by = value_channels(shape).to(weights[0].device) if name == "self_attn.o_proj" else None
            scales[name] = awq.search_scales(weights, grams[name], settings.group_size, fed_by)
        scales = fold(tensors, scales, shape)
    stored: dict[str, torch.Tensor] = {}
    for name, members in INPUTS.items():
        gram = grams[name] / (scales[name][:, None] * scales[name][None])
        for member in members:
            weight = tensors[f"{member}.weight"]
            grid = (
                awq.search_clip(weight, gram, settings.group_size)
                if settings.clip
                else awq.range_grid(weight, settings.group_size)
            )
            levels = rounding.compensated(weight, gram, grid) if settings.rounding == "compensated" else grid.quantize(weight)
            rounded = grid.dequantize(levels)
            lost, whole = awq.output_error(rounded - weight, gram), awq.output_error(weight, gram)
            report.error[member].append((lost / whole).clamp(min=0).sqrt().item())
            stored[f"{member}.qweight"] = pack(levels.T)
            stored[f"{member}.qzeros"] = pack(grid.zero_point.T)
            stored[f"{member}.scales"] = grid.scale.T.to(torch.float16).contiguous()
            tensors[f"{member}.weight"] = rounded
    for name in tensors:
        if name.removesuffix(".weight") not in LINEARS:
            stored[name] = half(name, tensors[name])
            tensors[name] = stored[name].float()
    return tensors, stored


def value_channels(shape: Shape) -> torch.Tensor:
    """For each input of o_proj [heads · head_dim] int64, the output of v_proj that feeds it (grouped-query attention)."""
    import torch

    outputs = torch.arange(shape.kv_heads * shape.head_dim).view(shape.kv_heads, 1, shape.head_dim)
    return outputs.expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)


def fold(tensors: dict[str, torch.Tensor], scales: Mapping[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """Multiply each linear's inputs by its scales, in place of `tensors`, and divide what comes before by the same.

    A norm's weight is stored as float16, so its scales are bent to what the rounded weight really divides by: folding then
    moves the layer's output by nothing but float32 rounding.

    Returns:
        The scales that were folded in.
    """
    import torch

    folded = dict(scales)
    for norm, name in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj")):
        weight = tensors[f"{norm}.weight"]
        divided = (weight / scales[name]).to(torch.float16).float()
        exact = (divided != 0) & torch.isfinite(divided)
        tensors[f"{norm}.weight"] = torch.where(exact, divided, weight)
        folded[name] = torch.where(exact, weight / divided, 1.0)
        if (bias := f"{norm}.bias") in tensors:
            tensors[bias] = tensors[bias] / folded[name]
    for before, name, feeds in (
        ("self_attn.v_proj", "self_attn.o_proj", value_channels(shape)),
        ("mlp.up_proj", "mlp.down_proj", torch.arange(shape.mlp)),
    ):
        feeds = feeds.to(scales[name].device)
        outputs = torch.ones(shape.linear(before)[0], device=scales[name].device)
        outputs[feeds] = scales[name]
        tensors[f"{before}.weight"] = tensors[f"{before}.weight"] / outputs[:, None]
        if (bias := f"{before}.bias") in tensors:
            tensors[bias] = tensors[bias] / outputs
    for name, members in INPUTS.items():
        for member in members:
            tensors[f"{member}.weight"] = tensors[f"{member}.weight"] * folded[name]
    return folded
