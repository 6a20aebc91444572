"""One run of `qembed quantize`: from a model's name to a finished folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.dtypes import BYTES
from qembed.checkpoint.files import read_json
from qembed.checkpoint.int8_table import INT8
from qembed.checkpoint.reranker import LABEL_HEAD
from qembed.errors import BadInput
from qembed.files import sha256, write_atomically
from qembed.installation import version
from qembed.quantize import autoawq, calibration_pairs, checks, float16, layerwise, manifest, writer
from qembed.quantize.blocks import LINEARS
from qembed.quantize.calibration import Calibration, prepare
from qembed.quantize.calibration_pairs import Pairs
from qembed.quantize.calibration_texts import Texts
from qembed.quantize.model_card import model_card
from qembed.quantize.parts import REPORT, Parts, assemble
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.targets import check_folder

if TYPE_CHECKING:
    import torch


def run(
    source: Checkpoint,
    target: Path,
    settings: QuantizationSettings,
    texts: Texts | Pairs,
    *,
    max_tokens: int,
    token_budget: int | None = None,
    check: int,
    device: torch.device,
    seed: int,
    force: bool,
    resume: bool,
    on_step: Callable[[str, int, int], None],
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Quantize `source` into the folder `target`; returns a summary of the result (JSON types only).

    All input is validated before anything is written.

    Args:
        source: the checkpoint to quantize.
        target: the folder to write; an existing one is replaced only with `force`.
        settings: see `QuantizationSettings`.
        texts: the texts to calibrate and to measure on; pairs for a reranker.
        max_tokens: longer texts are cut to this many tokens.
        token_budget: see `calibration.prepare`.
        check: number of held-out texts, on which the result is compared with the source; calibration does not see them.
        device: where to compute.
        seed: draws the held-out texts, and seeds every other random choice.
        force: replace an existing checkpoint that qembed wrote.
        resume: continue an interrupted run after its last finished layer, if there is one.
        on_step: called as (stage, steps done, steps in all); stages are "checking tensors", "layers" and "refining".
        warn: called with each warning, before anything is computed.

    Raises:
        BadInput: the model, its tensors or the target are unusable.
        Interrupted: a KeyboardInterrupt arrived.
        MissingExtra: the engine is AutoAWQ, and it cannot be imported.
        QembedError: writing failed, as on a full disk.
    """
    if settings.engine == "autoawq":
        autoawq.check_installed()
        quantize: Callable[..., Report] = autoawq.quantize
    else:
        quantize = partial(layerwise.quantize, on_refine=partial(on_step, "refining"))
    _check_settings(settings, source)
    target = target.expanduser()
    check_folder(target, [source.folder, *source.files.values()])
    shape = checks.shape_of(source, settings.group_size)
    writer.companions(source)
    if (unknown_tokens := source.vocabulary_warning) is not None:
        warn(f"{source.folder}: {unknown_tokens}")
    calibration = _prepare(texts, source, max_tokens=max_tokens, check=check, seed=seed, token_budget=token_budget)
    if settings.engine == "native":
        settings = layerwise.for_model(settings, source, calibration)
    with writer.claim(target, force=force) as partial_folder:
        checks.check_values(source, lambda done, total: on_step("checking tensors", done, total))
        origin = manifest.source_record(source, target)
        identity = fingerprint(source, origin, calibration, settings, seed, device)
        with writer.new_folder(target, partial_folder, identity, resume=resume) as work:
            report_path = work.parts / REPORT
            if report_path.exists():
                report = Report(**read_json(report_path))
            else:
                parts = Parts(work.parts)
                on_step("layers", 0, shape.layers)
                report = quantize(
                    source, shape, calibration, settings, device, parts, lambda done: on_step("layers", done, shape.layers)
                )
                write_atomically(report_path, json.dumps(asdict(report)))
            size = assemble(work.parts, work.checkpoint)
            _write_companions(work.checkpoint, source, origin, calibration, settings, report, seed, size)
            after = sizes(Checkpoint(target.name, work.checkpoint))
    return _summary(source, target, device, settings, calibration, report, after)


def _summary(
    source: Checkpoint,
    target: Path,
    device: torch.device,
    settings: QuantizationSettings,
    calibration: Calibration,
    report: Report,
    after: Mapping[str, int],
) -> dict[str, Any]:
    """What `run` returns; `after` are the `sizes` of the result."""
    before = sizes(source)
    return {
        "model": source.name,
        "task": manifest.task_of(source),
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
        "token_table": manifest.token_table_record(settings, report),
        "fidelity": manifest.fidelity_record(report),
        "float16": {"overflows": float16.overflows(report), "scaled": report.scaled},
        "calibration": manifest.calibration_record(calibration),
        "warnings": [source.vocabulary_warning] if source.vocabulary_warning else [],
    }


def _prepare(texts: Texts | Pairs, source: Checkpoint, **settings: Any) -> Calibration:
    if isinstance(texts, Pairs):
        return calibration_pairs.prepare(texts, source, **settings)
    return prepare(texts, source, **settings)


def _check_settings(settings: QuantizationSettings, source: Checkpoint) -> None:
    """Refuse a checkpoint that cannot be described, or settings that it cannot have."""
    if settings.engine == "autoawq" and not source.trunk.is_causal:
        raise BadInput(f"{source.folder}: attention is bidirectional, with which --engine autoawq cannot run a model")
    if source.reranker is not None and settings.engine == "autoawq":
        raise BadInput(f"{source.folder}: a reranker, whose scores --engine autoawq does not measure; use --engine native")
    if source.reranker is not None and settings.token_table == INT8:
        raise BadInput(f"{source.folder}: a reranker reads yes and no from its token table; leave --token-table int8 out")


def _write_companions(
    folder: Path,
    source: Checkpoint,
    origin: Mapping[str, Any],
    calibration: Calibration,
    settings: QuantizationSettings,
    report: Report,
    seed: int,
    size: int,
) -> None:
    """Write everything but the tensors into `folder`: tokenizer, model card, manifest, and last config.json."""
    writer.copy_companions(source, folder, without=writer.REDUNDANT if settings.token_table == INT8 else ())
    (folder / "README.md").write_text(model_card(source, settings, calibration, report, size), encoding="utf-8")
    floats = (LABEL_HEAD.removesuffix(".weight"),) if LABEL_HEAD in source.files else ()
    config = writer.as_json(
        writer.int4_config(source.trunk.config(source.config), settings.group_size, settings.token_table, floats)
    )
    contents = manifest.contents(source, origin, calibration, settings, report, seed, folder, config)
    write_atomically(folder / MANIFEST, writer.as_json(contents))
    write_atomically(folder / "config.json", config)


def fingerprint(
    source: Checkpoint,
    origin: Mapping[str, Any],
    calibration: Calibration,
    settings: QuantizationSettings,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that determines the bytes of the result (JSON types). Resuming a run requires an equal fingerprint."""
    import torch

    rows = json.dumps([calibration.rows, sorted(calibration.check)]).encode()
    companions = {name: sha256(path) for name in ("config.json", "tokenizer.json") if (path := source.folder / name).exists()}
    cuda = device.type == "cuda"
    return {
        "qembed": version(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
        **({"autoawq": metadata.version("autoawq")} if settings.engine == "autoawq" else {}),
        **origin["sha256"],
        **companions,
        "calibration": hashlib.sha256(rows).hexdigest(),
        **asdict(settings),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of all tensors ("all"), of the seven linear layers of every block ("linears"), and of the token table."""
    totals = {"all": 0, "linears": 0, "token_table": 0}
    for name, (shape, dtype) in checkpoint.shapes().items():
        size = math.prod(shape) * BYTES.get(dtype, 1)
        totals["all"] += size
        if any(f".{linear}." in name for linear in LINEARS):
            totals["linears"] += size
        elif name.startswith(f"{checkpoint.prefix}embed_tokens."):
            totals["token_table"] += size
    return totals
