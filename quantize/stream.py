"""Layer-wise quantization: load, run, quantize, write and forget one decoder layer at a time.

At most one layer's weights are in memory, beside two versions of the calibration tokens' hidden states. "quantized" is the
output of the layers quantized so far, which is what the next layer reads in the INT4 model; "original" is the output of the
original layers, which the next layer should return to. A second, smaller set of texts, which quantization never sees, runs
through both models too; at the end the two vectors of each text are compared.
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
from qembed.quantize.parts import Blocks, Parts
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 1024
LAST_SHARE = 0.5
"""Share of all weight that last tokens get where the tokenizer appends one."""


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
    """Quantize every layer of `checkpoint` into `parts`; without `parts` only measure the loss.

    The parts are "rest" (token table, final norm, an untied output head) and "layer-000", "layer-001", … Layers that an
    interrupted run left in `parts` are run but not quantized again: the layers after them get the same inputs, bit for bit.

    Args:
        checkpoint: the original.
        shape: its sizes.
        calibration: token rows to fit to, and the numbers of those that are held out.
        settings: the method.
        device: to compute on.
        parts: where the tensors go.
        on_layer: called with the number of finished layers.
        on_refine: called with (finished steps, all steps) of the last stage, which needs `parts`.

    Raises:
        BadInput: a tensor is missing, damaged, not finite, or exceeds the range of float16.
    """
    name = checkpoint.prefix + "embed_tokens.weight"
    ids = sorted({0, *(token for row in calibration.rows for token in row)})  # rows are padded with 0
    converted = table.convert(checkpoint, name, ids, settings.token_table)
    if parts is not None and "rest" not in parts:
        parts.write("rest", {**_outside_layers(checkpoint, name), **converted.tensors}, {})
    final_norm = half("norm.weight", checkpoint.tensor(checkpoint.prefix + "norm.weight")).float()
    epsilon = checkpoint.config.get("rms_norm_eps", 1e-6)
    calibration_batches = _calibration_batches(calibration, settings)
    held_out_batches = batches.plain(calibration.rows, sorted(calibration.check), BATCH_TOKENS)
    served_rows = converted.served
    quantized, original = (Stream.start(rows, calibration_batches) for rows in (served_rows, converted.original))
    held_out = {
        "original": Stream.start(converted.original, held_out_batches),
        "quantized": Stream.start(served_rows, held_out_batches),
    }
    report = Report(table_error=converted.error)
    del converted
    block = DecoderLayer(checkpoint, device)
    for layer in range(shape.layers):
        tensors = _layer_tensors(checkpoint, layer, device)
        block.load(tensors, layer)
        held_out["original"].advance(block)
        before = list(original.hidden)
        targets = None
        if settings.target == "original":
            targets = OriginalStates(before, original.advance(block), original.hidden)
        elif settings.inputs == "original" or settings.refine:
            original.advance(block)
        if not _rerun_finished(checkpoint, layer, parts, block, quantized, report):
            inputs = quantized if settings.inputs == "quantized" else Stream(calibration_batches, before)
            stored = LayerQuantizer(block, layer, tensors, shape, settings, report).run(inputs, targets)
            if parts is not None:
                prefix = f"{checkpoint.prefix}layers.{layer}."
                errors = {linear: values[-1] for linear, values in report.error.items()}
                parts.write(_part(layer), {prefix + key: tensor.cpu() for key, tensor in stored.items()}, errors)
        held_out["quantized"].advance(block)
        on_layer(layer + 1)
    if settings.refine and parts is not None:
        targets_by_batch = [rms_norm(hidden[batch.last], final_norm, epsilon) for batch, hidden in original]
        del quantized, original
        model = refine.Model(block, checkpoint.prefix, shape.layers, parts, final_norm, epsilon)
        start = Stream.start(served_rows, calibration_batches)
        refine.refine(model, start, targets_by_batch, epochs=settings.refine, seed=calibration.seed, on_step=on_refine)
        held_out["quantized"] = Stream.start(served_rows, held_out_batches)
        for layer in range(shape.layers):
            block.load(as_computed(model.read(layer)), layer)
            held_out["quantized"].advance(block)
    vectors = [held_out[side].vectors(final_norm, epsilon) for side in ("original", "quantized")]
    report.cosines = (vectors[0] * vectors[1]).sum(-1).tolist()
    return report


def _part(layer: int) -> str:
    return f"layer-{layer:03d}"


def _outside_layers(checkpoint: Checkpoint, token_table: str) -> dict[str, torch.Tensor | Blocks]:
    """The tensors that belong to no layer, except the one named `token_table`, as float16; matrices are read in blocks."""
    shapes = checkpoint.shapes()
    names = [name for name in checkpoint.files if ".layers." not in f".{name}" and name != token_table]
    return {
        name: half(name, checkpoint.tensor(name)) if len(shapes[name][0]) < 2 else table.in_blocks(checkpoint, name)
        for name in names
    }


def _layer_tensors(checkpoint: Checkpoint, layer: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a layer, named without its prefix, rounded to float16 and held as float32."""
    prefix = f"{checkpoint.prefix}layers.{layer}."
    return {
        name.removeprefix(prefix): half(name, checkpoint.tensor(name)).to(device).float()
        for name in checkpoint.files
        if name.startswith(prefix) and not name.endswith(NOT_STORED)
    }


def _rerun_finished(
    checkpoint: Checkpoint, layer: int, parts: Parts | None, block: DecoderLayer, quantized: Stream, report: Report
) -> bool:
    """If an interrupted run has finished this layer: load it, advance `quantized`, and add its errors to `report`."""
    finished = None if parts is None else parts.read(_part(layer))
    if finished is None:
        return False
    tensors, errors = finished
    prefix = f"{checkpoint.prefix}layers.{layer}."
    stored = {name.removeprefix(prefix): tensor.to(block.device) for name, tensor in tensors.items()}
    block.load(as_computed(stored), layer)
    quantized.advance(block)
    for linear, error in errors.items():
        report.error[linear].append(error)
    return True


def _calibration_batches(calibration: Calibration, settings: QuantizationSettings) -> list[Batch]:
    """Batches that the layers are fitted to: texts, their mixed copies, and prefixes of both; no batch spans two folds."""
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
    """Share of all weight that last tokens get: `settings.last_share`, or if that is None a share by the tokenizer.

    If the tokenizer appends a token, all vectors come from it, so it gets LAST_SHARE. If not, a last token is like any other,
    and extra weight on a few tokens would only reduce the effective sample: no extra weight.
    """
    if settings.last_share is not None:
        return settings.last_share
    seen = (number for number in range(len(calibration.rows)) if number not in calibration.check)
    return LAST_SHARE if batches.ends_alike(calibration.rows, seen) else 0.0


def _folds(rows: Sequence[Sequence[int]], numbers: Sequence[int], seed: int) -> dict[int, int]:
    """The cross-validation fold (0 or 1) of each row in `numbers`: equal rows share one, and both get similar lengths."""
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
    """The tensors of a layer in float32, from those in the checkpoint's format: packed linears are dequantized to `weight`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            tensors[f"{linear}.weight"] = dequantize(tensor, stored[f"{linear}.qzeros"], stored[f"{linear}.scales"])
        elif f"{linear}.qweight" not in stored or kind == "bias":
            tensors[name] = tensor.float()
    return tensors
