"""One decoder layer at a time: load, run, quantize, write, forget.

Never more than one layer's weights are in memory. Beside them stand the hidden states of the calibration tokens, twice: as they
come through the layers already quantized, which are the inputs that the next layer will really get, and as they are in the
original model, which the next layer should come back to. A second, smaller stream of texts that quantization never sees runs
through both as well; where it ends, the two vectors of each text are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qembed.checkpoint.awq_layout import dequantize
from qembed.checkpoint.description import Checkpoint
from qembed.quantize import batches, refine, table
from qembed.quantize.batches import Batch
from qembed.quantize.blocks import NOT_STORED, Architecture, DecoderLayer, rms_norm
from qembed.quantize.calibration import Calibration
from qembed.quantize.hidden import OriginalStates, Stream
from qembed.quantize.layer import LayerQuantizer
from qembed.quantize.mixing import mixed
from qembed.quantize.parts import Parts
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 1024
LAST_SHARE = 0.5
"""What last tokens count of all where the tokenizer appends one."""


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
    """Quantize every layer of `checkpoint`, one by one, into `parts`, or only to measure what is lost.

    Parts are "layer-000" … and, first, "rest" (token table, final norm, output head where it is its own). Layers that are
    there already, from a run that was broken off, are run and not made again: what comes after gets the same inputs, bit for
    bit. `on_layer(n)` is called when n layers are done, `on_refine(n, all)` when n steps of the last stage are; that stage
    works on `parts` and is left out without them.

    Raises:
        BadInput: a tensor is missing, damaged, not finite, or greater than float16 holds.
    """
    name = checkpoint.prefix + "embed_tokens.weight"
    outside = [other for other in checkpoint.files if ".layers." not in f".{other}" and other != name]
    shapes = checkpoint.shapes()
    rest = {
        other: half(other, checkpoint.tensor(other)) if len(shapes[other][0]) < 2 else table.in_blocks(checkpoint, other)
        for other in outside
    }
    ids = sorted({0, *(token for row in calibration.rows for token in row)})  # rows are padded with 0
    converted = table.convert(checkpoint, name, ids, settings.token_table)
    if parts is not None and "rest" not in parts:
        parts.write("rest", {**rest, **converted.tensors}, {})
    final_norm = half("norm.weight", checkpoint.tensor(checkpoint.prefix + "norm.weight")).float()
    calibrated = _calibrated(calibration, settings)
    apart = batches.plain(calibration.rows, sorted(calibration.check), BATCH_TOKENS)
    tables = {"quantized": converted.served, "original": converted.original}
    streams = {side: Stream.start(rows, calibrated) for side, rows in tables.items()}
    checks = {side: Stream.start(rows, apart) for side, rows in tables.items()}
    report = Report(table_error=converted.error)
    first = tables["quantized"]
    del rest, converted, tables
    block = DecoderLayer(checkpoint, device)
    for layer in range(shape.layers):
        prefix = f"{checkpoint.prefix}layers.{layer}."
        tensors = {
            name.removeprefix(prefix): half(name, checkpoint.tensor(name)).to(device).float()
            for name in checkpoint.files
            if name.startswith(prefix) and not name.endswith(NOT_STORED)
        }
        block.load(tensors, layer)
        checks["original"].advance(block)
        goal = None
        before = list(streams["original"].hidden)
        if settings.target == "original":
            goal = OriginalStates(before, streams["original"].advance(block), streams["original"].hidden)
        elif settings.inputs == "original" or settings.refine:
            streams["original"].advance(block)
        part = f"layer-{layer:03d}"
        finished = None if parts is None else parts.read(part)
        if finished is None:
            stored = LayerQuantizer(block, layer, tensors, shape, settings, report).run(
                streams["quantized"] if settings.inputs == "quantized" else Stream(calibrated, before), goal
            )
            notes = {name: values[-1] for name, values in report.error.items()}
            if parts is not None:
                parts.write(part, {prefix + name: tensor.cpu() for name, tensor in stored.items()}, notes)
        else:
            found = {name.removeprefix(prefix): tensor.to(device) for name, tensor in finished[0].items()}
            block.load(as_computed(found), layer)
            streams["quantized"].advance(block)
            for name, error in finished[1].items():
                report.error[name].append(error)
        checks["quantized"].advance(block)
        on_layer(layer + 1)
    epsilon = checkpoint.config.get("rms_norm_eps", 1e-6)
    if settings.refine and parts is not None:
        wanted = [rms_norm(hidden[batch.last], final_norm, epsilon) for batch, hidden in streams["original"]]
        del streams
        model = refine.Model(block, checkpoint.prefix, shape.layers, parts, final_norm, epsilon)
        start = Stream.start(first, calibrated)
        refine.refine(model, start, wanted, epochs=settings.refine, seed=calibration.seed, on_step=on_refine)
        checks["quantized"] = Stream.start(first, apart)
        for layer in range(shape.layers):
            block.load(as_computed(model.read(layer)), layer)
            checks["quantized"].advance(block)
    vectors = [checks[name].vectors(final_norm, epsilon) for name in ("original", "quantized")]
    report.cosines = (vectors[0] * vectors[1]).sum(-1).tolist()
    return report


def _calibrated(calibration: Calibration, settings: QuantizationSettings) -> list[Batch]:
    """All that the layers are fitted to: texts, their mixed copies, prefixes of both."""
    seen = [number for number in range(len(calibration.rows)) if number not in calibration.check]
    copies = mixed(calibration.rows, seen, settings.mixed, calibration.seed)
    rows = [*calibration.rows, *copies]
    folds = _folds(calibration.rows, seen, calibration.seed)
    folds |= {len(calibration.rows) + copy: folds[number] for copy, number in enumerate(seen[: len(copies)])}
    return batches.with_prefixes(
        rows,
        list(folds),
        BATCH_TOKENS,
        prefixes=settings.prefixes,
        last_share=last_share(settings, calibration),
        seed=calibration.seed,
        folds=folds,
    )


def last_share(settings: QuantizationSettings, calibration: Calibration) -> float:
    """What last tokens count of all: `settings.last_share`, or by the tokenizer where that is None.

    Where the tokenizer appends a token, all vectors come from that one. Where it appends none, a last token is one like the
    others, and to weigh some more is to see fewer.
    """
    if settings.last_share is not None:
        return settings.last_share
    seen = (number for number in range(len(calibration.rows)) if number not in calibration.check)
    return LAST_SHARE if batches.ends_alike(calibration.rows, seen) else 0.0


def _folds(rows: Sequence[Sequence[int]], numbers: Sequence[int], seed: int) -> dict[int, int]:
    """Which half, 0 or 1, each of the rows with these `numbers` is in: equal rows in the same, similar lengths in either."""
    draw = random.Random(seed)
    equal: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        equal.setdefault(tuple(rows[number]), []).append(number)
    folds: dict[int, int] = {}
    fold = 0
    for place, row in enumerate(sorted(equal, key=lambda row: (len(row), row))):
        fold = 1 - fold if place % 2 else draw.randrange(2)
        folds |= dict.fromkeys(equal[row], fold)
    return {number: folds[number] for number in numbers}


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
