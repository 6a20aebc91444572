"""Quantizes a model layer by layer: load a layer, run it, quantize it, write it, release it.

At most one layer's weights are in memory. Besides them there are two sets of hidden states of the calibration tokens: those
from the layers quantized so far, which are the real inputs of the next layer, and those of the original model, which the next
layer should return to. The held-out texts, a smaller set, also pass through both models; at the end their vectors are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.awq_layout import dequantize
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.head import Head
from qembed.checkpoint.score_row import score_row
from qembed.errors import BadInput
from qembed.quantize import batches, float16, heap, products, refine, table
from qembed.quantize.batches import Batch
from qembed.quantize.blocks import NOT_STORED, Architecture, DecoderLayer
from qembed.quantize.calibration import Calibration
from qembed.quantize.hidden import OriginalStates, States, Stream, text_vectors, unit_length
from qembed.quantize.layer import LayerQuantizer
from qembed.quantize.mixing import mixed_copies
from qembed.quantize.parts import Parts
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 1024
LAST_SHARE = 0.5
"""Total weight of the last tokens if the tokenizer appends one, and its state is the vector."""
PREFIXES = 8
"""Prefixes of each text, where they are texts of their own."""


@dataclass
class _Streams:
    """The hidden states of the same texts in the quantized and in the original model."""

    quantized: Stream
    original: Stream

    @classmethod
    def start(cls, converted: table.Converted, texts: list[Batch], in_half: bool = False) -> _Streams:
        return cls(*(Stream.start(rows, texts, in_half) for rows in (converted.served, converted.original)))


def quantize(
    checkpoint: Checkpoint,
    shape: Architecture,
    calibration: Calibration,
    settings: QuantizationSettings,
    device: torch.device,
    parts: Parts | None = None,
    on_layer: Callable[[int], None] = lambda _: None,
    on_refine: Callable[[int, int], None] = lambda *_: None,
) -> Report:
    """Quantize every layer of `checkpoint` into `parts`, or without `parts`, only measure the loss.

    Parts are "rest" (token table, final norm, output head if it is not tied), written first, and "layer-000", … Layers that are
    already in `parts`, from an interrupted run, are run but not quantized again, so later layers get the same inputs, bit for
    bit.

    Args:
        checkpoint: the source.
        shape: its architecture.
        calibration: the texts to fit the layers to, and the held-out texts.
        settings: see `QuantizationSettings`. `refine` requires `parts`, and is ignored without them.
        device: where to compute.
        parts: where to write the result.
        on_layer: called as on_layer(n) when n layers are done.
        on_refine: called as on_refine(steps done, steps in all) during the last stage.

    Raises:
        BadInput: a tensor is missing, damaged, not finite, or exceeds the range of float16.
    """
    heap.keep()
    converted = _convert_rest(checkpoint, calibration, settings, parts)
    final_norm = half("norm.weight", checkpoint.tensor(checkpoint.prefix + "norm.weight")).float()
    epsilon = checkpoint.config.get("rms_norm_eps", 1e-6)
    head = Head.of(checkpoint.trunk)
    calibration_batches = _calibration_batches(calibration, for_model(settings, checkpoint, calibration))
    held_out_batches = batches.plain(calibration.rows, sorted(calibration.check), BATCH_TOKENS)
    streams = _Streams.start(converted, calibration_batches, in_half=True)
    held_out = _Streams.start(converted, held_out_batches)
    report, served = Report(table_error=converted.error), converted.served if settings.refine else None
    del converted
    block = DecoderLayer(checkpoint, device)
    for layer in range(shape.layers):
        tensors = _original_tensors(checkpoint, layer, device)
        block.load(tensors, layer)
        held_out.original.advance(block)
        quantizer = LayerQuantizer(block, layer, tensors, shape, settings, report)
        del tensors  # the quantizer drops each weight as soon as it is rounded
        block.load(quantizer.tensors, layer, products.calibration_dtype(device))
        block.load(_quantize_layer(quantizer, streams, parts, f"{checkpoint.prefix}layers.{layer}."), layer)
        held_out.quantized.advance(block)
        on_layer(layer + 1)
    if served is not None and parts is not None:
        targets = [text_vectors(hidden, batch, final_norm, epsilon, head) for batch, hidden in streams.original]
        del streams
        model = refine.Model(block, checkpoint.prefix, shape.layers, parts, final_norm, epsilon, head)
        start = Stream.start(served, calibration_batches)
        refine.refine(model, start, targets, epochs=settings.refine, seed=calibration.seed, on_step=on_refine)
        held_out.quantized = Stream.start(served, held_out_batches)
        for layer in range(shape.layers):
            block.load(dequantize_layer(model.read(layer)), layer)
            held_out.quantized.advance(block)
    sides = [side.outputs(final_norm, epsilon, head) for side in (held_out.original, held_out.quantized)]
    original_vectors, vectors = (unit_length(outputs) for outputs in sides)
    report.cosines = (original_vectors * vectors).sum(-1).tolist()
    if checkpoint.reranker is not None:
        row = score_row(checkpoint, checkpoint.reranker)
        report.scores = list(zip(*((states @ row).sigmoid().tolist() for states in sides), strict=True))
        report.queries = [calibration.queries[number] for number in batches.by_length(calibration.rows, calibration.check)]
    return report


def _convert_rest(
    checkpoint: Checkpoint, calibration: Calibration, settings: QuantizationSettings, parts: Parts | None
) -> table.Converted:
    """Write the part "rest", unless it exists: the tensors outside the layers. Returns the converted token table."""
    table_name = checkpoint.prefix + "embed_tokens.weight"
    names = [name for name in checkpoint.files if ".layers." not in f".{name}" and name != table_name]
    shapes = checkpoint.shapes()
    rest = {
        name: half(name, checkpoint.tensor(name)) if len(shapes[name][0]) < 2 else table.in_blocks(checkpoint, name)
        for name in names
    }
    ids = sorted({0, *(token for row in calibration.rows for token in row)})  # rows are padded with 0
    converted = table.convert(checkpoint, table_name, ids, settings.token_table)
    if parts is not None and "rest" not in parts:
        parts.write("rest", {**rest, **converted.tensors}, {})
    return converted


def _original_tensors(checkpoint: Checkpoint, layer: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of `layer`, rounded to float16 and converted to float32, named without the layer's prefix."""
    prefix = f"{checkpoint.prefix}layers.{layer}."
    return {
        name.removeprefix(prefix): half(name, checkpoint.tensor(name)).to(device).float()
        for name in checkpoint.files
        if name.startswith(prefix) and not name.endswith(NOT_STORED)
    }


def _quantize_layer(quantizer: LayerQuantizer, streams: _Streams, parts: Parts | None, prefix: str) -> dict[str, torch.Tensor]:
    """Quantize a layer, which is loaded in the block of `quantizer`, write it to `parts`, and advance `streams` through it.

    The part of the layer contains its tensors, with `prefix` before their names, and as notes its errors and the largest
    numbers that it computes. A part that already exists is loaded instead; without those numbers it is another quantizer's.

    Returns:
        The tensors in float32 that the INT4 model computes with, without `prefix`: the reported cosines are those of float32.
    """
    block, settings, report = quantizer.block, quantizer.settings, quantizer.report
    original_inputs, original = _advance_original(streams.original, block, settings)
    name = f"layer-{quantizer.number:03d}"
    part = None if parts is None else parts.read(name)
    if parts is None or part is None:
        inputs = (
            streams.quantized
            if settings.inputs == "quantized"
            else Stream(streams.original.batches, original_inputs, in_half=True)
        )
        stored = quantizer.run(inputs, original)
        errors = {linear: values[-1] for linear, values in report.error.items()}
        ranges = quantizer.ranges.record()
        report.add_ranges(ranges)
        if parts is not None:
            notes = {"error": errors, "ranges": ranges}
            parts.write(name, {prefix + key: tensor.cpu() for key, tensor in stored.items()}, notes)
        return quantizer.tensors
    tensors, notes = part
    stored = {key.removeprefix(prefix): tensor.to(block.device) for key, tensor in tensors.items()}
    values = dequantize_layer(stored)
    block.load(values, quantizer.number, products.calibration_dtype(block.device))
    if "ranges" in notes:
        streams.quantized.advance(block)
    else:
        stored, ranges = _make_safe(quantizer, stored, streams.quantized)
        notes = {"error": notes, "ranges": ranges}
        parts.write(name, {prefix + key: tensor.cpu() for key, tensor in stored.items()}, notes)
        values = dequantize_layer(stored)
    report.add_ranges(notes["ranges"])
    for linear, error in notes["error"].items():
        report.error[linear].append(error)
    return values


def _make_safe(
    quantizer: LayerQuantizer, stored: dict[str, torch.Tensor], stream: Stream
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Scale the `stored` layer, which is loaded, so that float16 can hold what it computes; advance `stream` through it.

    Returns:
        The layer as it is now stored and loaded, and the largest numbers that it computes (`Ranges.record`).
    """
    block, before = quantizer.block, stream.hidden
    ranges = float16.measure(stream, block)
    scaled = float16.scale_down(stored, ranges, quantizer.shape, quantizer.settings.group_size)
    if scaled is None:
        return stored, ranges.record()
    block.load(dequantize_layer(scaled), quantizer.number, products.calibration_dtype(block.device))
    stream.hidden = before
    divisors = ranges.scaled
    ranges = float16.measure(stream, block)
    ranges.scaled = divisors
    return scaled, ranges.record()


def _advance_original(
    stream: Stream, block: DecoderLayer, settings: QuantizationSettings
) -> tuple[States, OriginalStates | None]:
    """Run the original layer in `block`, if any setting needs its hidden states.

    Returns:
        The hidden states before the layer, and with the target "original" the states that the quantized layer is fitted to.
    """
    before = stream.hidden
    if settings.target == "original":
        return before, OriginalStates(before, stream.advance(block), stream.hidden)
    if settings.inputs == "original" or settings.refine:
        stream.advance(block)
    return before, None


def _calibration_batches(calibration: Calibration, settings: QuantizationSettings) -> list[Batch]:
    """The batches that the layers are fitted to: texts, their mixed copies, and prefixes of both."""
    numbers = [number for number in range(len(calibration.rows)) if number not in calibration.check]
    copies = mixed_copies(calibration.rows, numbers, settings.mixed, calibration.seed)
    rows = [*calibration.rows, *copies]
    folds = _assign_folds(calibration, numbers)
    folds |= {len(calibration.rows) + copy: folds[number] for copy, number in enumerate(numbers[: len(copies)])}
    return batches.with_prefixes(
        rows,
        list(folds),
        BATCH_TOKENS,
        prefixes=settings.prefixes or 0,
        last_share=settings.last_share or 0,
        seed=calibration.seed,
        folds=folds,
    )


def for_model(settings: QuantizationSettings, checkpoint: Checkpoint, calibration: Calibration) -> QuantizationSettings:
    """`settings` with `prefixes` and `last_share` chosen where they are None: by what becomes the vector, or the score.

    Prefixes are texts of their own only where no token attends to those after it, and one state more gives a vector only where
    the last token's is the vector: PREFIXES, otherwise 0. If all vectors come from a token that the tokenizer appends, the last
    tokens have LAST_SHARE of the weight. Otherwise all tokens count the same: with mean pooling each is part of the vector, and
    without an appended token the last ones are tokens like any other. A reranker's prompts have no prefixes, because a score is
    read at the end of the template, and their last tokens have LAST_SHARE.

    Raises:
        BadInput: prefixes or a weight of last tokens are wanted that have no meaning for this model.
    """
    embedder = checkpoint.trunk
    by_last = embedder.pooling == "last"
    if checkpoint.reranker is not None:
        if settings.prefixes:
            raise BadInput(f"--prefixes {settings.prefixes}: a reranker's score is read behind its template; leave it out")
        settings = replace(settings, prefixes=0)
    if settings.prefixes and not (by_last and embedder.is_causal):
        reason = "attention is bidirectional" if not embedder.is_causal else "vectors are means of all tokens"
        raise BadInput(f"--prefixes {settings.prefixes}: prefixes are no texts of their own, because {reason}; leave it out")
    if settings.last_share and not by_last:
        raise BadInput(f"--last-share {settings.last_share:g}: vectors are means of all tokens; leave it out")
    numbers = (number for number in range(len(calibration.rows)) if number not in calibration.check)
    from_appended = by_last and batches.have_same_end(calibration.rows, numbers)
    default_prefixes = PREFIXES if by_last and embedder.is_causal else 0
    return replace(
        settings,
        prefixes=default_prefixes if settings.prefixes is None else settings.prefixes,
        last_share=(LAST_SHARE if from_appended else 0.0) if settings.last_share is None else settings.last_share,
    )


def _assign_folds(calibration: Calibration, numbers: Sequence[int]) -> dict[int, int]:
    """Assign each of the rows with these `numbers` to fold 0 or 1: similar lengths evenly to both.

    Equal rows are in the same fold, and the rows of a reranker's query, unless all have the same query.
    """
    rows, queries = calibration.rows, calibration.queries
    by_query = len(queries) > 0 and len({queries[number] for number in numbers}) > 1
    draw = random.Random(calibration.seed)
    groups: dict[object, list[int]] = {}
    for number in numbers:
        groups.setdefault(queries[number] if by_query else tuple(rows[number]), []).append(number)
    folds: dict[int, int] = {}
    fold = 0
    by_length = sorted(groups.values(), key=lambda members: (len(rows[members[0]]), tuple(rows[members[0]])))
    for position, members in enumerate(by_length):
        fold = 1 - fold if position % 2 else draw.randrange(2)
        folds |= dict.fromkeys(members, fold)
    return {number: folds[number] for number in numbers}


def dequantize_layer(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `stored` tensors of a layer in float32, as `DecoderLayer.load` takes them: packed linear layers become `weight`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            tensors[f"{linear}.weight"] = dequantize(tensor, stored[f"{linear}.qzeros"], stored[f"{linear}.scales"])
        elif f"{linear}.qweight" not in stored or kind == "bias":
            tensors[name] = tensor.float()
    return tensors
