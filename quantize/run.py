"""One run of `qembed quantize`, from the name of a model to a finished folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.checkpoint import CARD, Checkpoint, find
from qembed.errors import BadInput
from qembed.quantize import blocks, card, writer
from qembed.quantize.blocks import LINEARS
from qembed.quantize.calibration import built_in
from qembed.quantize.stream import Settings, quantize
from qembed.token_table import INT8

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 512
"""Where calibration texts are cut: attention costs grow with the square, and no built-in text is much longer."""

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1, "I8": 1, "F64": 8}


def run(
    model: str,
    target: Path,
    settings: Settings,
    *,
    device: torch.device,
    seed: int,
    force: bool,
    check: int,
    on_layer: Callable[[int, int], None],
) -> dict[str, Any]:
    """Quantize `model` into the folder `target` and tell what came of it (JSON types only).

    Everything that can be wrong with the input is looked at before anything is written.

    Args:
        model: as `qembed.checkpoint.find` takes it.
        target: the folder to write; replaced only with `force`.
        settings: see there.
        device: where to compute.
        seed: draws the `check` texts that are kept apart.
        force: replace a checkpoint of ours.
        check: texts on which the result is compared with the source; calibration does not see them.
        on_layer: called with (layers done, layers in all).

    Raises:
        BadInput: the model, its tensors, or the target cannot be used.
        QembedError: writing failed, as on a full disk.
    """
    source = find(model)
    target = target.expanduser()
    if source.folder.resolve() == target.resolve() or source.folder.resolve() in target.resolve().parents:
        raise BadInput(f"{target}: is or lies in the source checkpoint; choose another --output")
    shape = blocks.shape_of(source, settings.group_size)
    length = min(MAX_TOKENS, source.config.get("max_position_embeddings", MAX_TOKENS))
    calibration = built_in(source, max_tokens=length, check=check, seed=seed)
    with writer.new_folder(target, force=force) as folder:
        origin = card.source_record(source, target)
        report = quantize(
            source,
            shape,
            calibration,
            settings,
            device,
            write=lambda part, tensors: writer.save_part(folder, part, tensors),
            on_layer=lambda done: on_layer(done, shape.layers),
        )
        size = writer.assemble(folder)
        writer.copy_companions(source, folder, without=writer.REPEATED if settings.token_table == INT8 else ())
        (folder / "README.md").write_text(card.model_card(source, settings, calibration, report, size), encoding="utf-8")
        writer.write_json(folder / CARD, card.record(origin, calibration, settings, report, seed, folder))
        writer.write_json(folder / "config.json", writer.int4_config(source.config, settings.group_size, settings.token_table))
        after = sizes(Checkpoint(target.name, folder))
    before = sizes(source)
    return {
        "model": source.name,
        "output": str(target),
        "device": str(device),
        "bytes": {
            "before": before["all"],
            "after": after["all"],
            "linears": {"before": before["linears"], "after": after["linears"]},
            "token_table": {"before": before["token_table"], "after": after["token_table"]},
        },
        "error": {name: report.relative_error(name) for name in LINEARS},
        "token_table": card.token_table(settings, report),
        "fidelity": card.fidelity(report),
        "calibration": {"texts": len(calibration.rows) - len(calibration.check), "tokens": calibration.tokens},
    }


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of all tensors ("all"), of the seven linears of the blocks ("linears"), and of the token table ("token_table")."""
    found = {"all": 0, "linears": 0, "token_table": 0}
    for name, (shape, dtype) in checkpoint.shapes().items():
        size = math.prod(shape) * BYTES.get(dtype, 1)
        found["all"] += size
        if any(f".{linear}." in name for linear in LINEARS):
            found["linears"] += size
        elif name.startswith(f"{checkpoint.prefix}embed_tokens."):
            found["token_table"] += size
    return found
