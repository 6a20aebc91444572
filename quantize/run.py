"""One run of `qembed quantize`, from the name of a model to a finished folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.dtypes import BYTES
from qembed.checkpoint.files import read_json
from qembed.checkpoint.find import find
from qembed.checkpoint.int8_table import INT8
from qembed.errors import BadInput
from qembed.files import sha256, write_atomically
from qembed.quantize import autoawq, checks, manifest, model_card, stream, writer
from qembed.quantize.blocks import LINEARS
from qembed.quantize.calibration import Calibration, prepare
from qembed.quantize.calibration_texts import Texts
from qembed.quantize.parts import DONE, Parts, assemble
from qembed.quantize.settings import QuantizationSettings, Report

if TYPE_CHECKING:
    import torch


def run(
    model: str,
    target: Path,
    settings: QuantizationSettings,
    texts: Texts,
    *,
    max_tokens: int,
    check: int,
    device: torch.device,
    seed: int,
    force: bool,
    resume: bool,
    on_step: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Quantize `model` into the folder `target` and tell what came of it (JSON types only).

    Everything that can be wrong with the input is looked at before anything is written.

    Args:
        model: as `qembed.checkpoint.find` takes it.
        target: the folder to write; replaced only with `force`.
        settings: see there.
        texts: to calibrate and to measure on.
        max_tokens: where they are cut.
        check: texts on which the result is compared with the source; calibration does not see them.
        device: where to compute.
        seed: draws the `check` texts that are kept apart.
        force: replace a checkpoint of ours.
        resume: go on after the last finished layer of a run that was broken off, if there is one.
        on_step: called with what is being done ("checking tensors", "layers", "refining"), how many are done, and how many
            there are.

    Raises:
        BadInput: the model, its tensors, or the target cannot be used.
        Interrupted: KeyboardInterrupt came.
        MissingExtra: the engine is AutoAWQ, and it cannot be imported.
        QembedError: writing failed, as on a full disk.
    """
    if settings.engine == "autoawq":
        autoawq.check_installed()
    refining = partial(on_step, "refining")
    quantize = autoawq.quantize if settings.engine == "autoawq" else partial(stream.quantize, on_refine=refining)
    source = find(model)
    target = target.expanduser()
    if source.folder.resolve() == target.resolve() or source.folder.resolve() in target.resolve().parents:
        raise BadInput(f"{target}: is or lies in the source checkpoint; choose another --output")
    shape = checks.shape_of(source, settings.group_size)
    writer.companions(source)
    calibration = prepare(texts, source, max_tokens=max_tokens, check=check, seed=seed)
    if settings.engine == "native":
        settings = replace(settings, last_share=stream.last_share(settings, calibration))
    with writer.claim(target, force=force) as place:
        checks.check_values(source, lambda done, total: on_step("checking tensors", done, total))
        origin = manifest.source_record(source, target)
        decides = fingerprint(source, origin, calibration, settings, seed, device)
        with writer.new_folder(target, place, decides, resume=resume) as work:
            noted, folder = work.parts / DONE, work.checkpoint
            if noted.exists():
                report = Report(**read_json(noted))
            else:
                parts = Parts(work.parts)
                report = quantize(
                    source, shape, calibration, settings, device, parts, lambda done: on_step("layers", done, shape.layers)
                )
                write_atomically(noted, json.dumps(asdict(report)))
            size = assemble(work.parts, folder)
            writer.copy_companions(source, folder, without=writer.REPEATED if settings.token_table == INT8 else ())
            (folder / "README.md").write_text(
                model_card.model_card(source, settings, calibration, report, size), encoding="utf-8"
            )
            config = writer.as_json(writer.int4_config(source.config, settings.group_size, settings.token_table))
            record = manifest.record(origin, calibration, settings, report, seed, folder, config)
            write_atomically(folder / MANIFEST, writer.as_json(record))
            write_atomically(folder / "config.json", config)
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
        "engine": settings.engine,
        "error": {name: report.relative_error(name) for name in LINEARS if report.error[name]},
        "token_table": manifest.token_table(settings, report),
        "fidelity": manifest.fidelity(report),
        "calibration": manifest.calibration_record(calibration),
    }


def fingerprint(
    source: Checkpoint,
    origin: Mapping[str, Any],
    calibration: Calibration,
    settings: QuantizationSettings,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result (JSON types): a run is resumed only by one with the same."""
    import torch

    rows = json.dumps([calibration.rows, sorted(calibration.check)]).encode()
    others = {name: sha256(path) for name in ("config.json", "tokenizer.json") if (path := source.folder / name).exists()}
    cuda = device.type == "cuda"
    return {
        **{name: version(name) for name in ("qembed", "torch", "transformers")},
        **({"autoawq": version("autoawq")} if settings.engine == "autoawq" else {}),
        **origin["sha256"],
        **others,
        "calibration": hashlib.sha256(rows).hexdigest(),
        **asdict(settings),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
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
