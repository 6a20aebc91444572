"""qembed.json, the manifest of a checkpoint: versions, source, calibration, settings, fidelity, and the hash of every file."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

from qembed.checkpoint import model_card
from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.find import SAMPLE
from qembed.checkpoint.float16 import FIELD as FLOAT16
from qembed.checkpoint.int8_table import INT8
from qembed.checkpoint.reranker import Task
from qembed.files import sha256
from qembed.installation import version
from qembed.quantize import float16
from qembed.quantize.calibration import Calibration
from qembed.quantize.settings import QuantizationSettings, Report

OWN_HASH = "sha256"
"""The manifest's field with the hash of its other fields."""
NATIVE_ONLY = ("scales", "rounding", "target", "inputs", "prefixes", "mixed", "last_share", "refine")
"""Settings that AutoAWQ does not have."""


def contents(
    checkpoint: Checkpoint,
    source: Mapping[str, Any],
    calibration: Calibration,
    settings: QuantizationSettings,
    report: Report,
    seed: int,
    folder: Path,
    config: str,
) -> dict[str, Any]:
    """The contents of qembed.json: what is needed to reproduce the checkpoint byte for byte, and to verify it.

    Args:
        checkpoint: the source.
        source: from `source_record`.
        calibration: the calibration rows.
        settings: the settings of the run.
        report: the measured losses.
        seed: the seed of the run.
        folder: the checkpoint, complete but for config.json and the manifest itself.
        config: the text of config.json, which is written last.
    """
    separate = (Path(MANIFEST), Path("config.json"), Path(model_card.FILE))
    return sealed(
        {
            "qembed": version(),
            **({"task": task_of(checkpoint)} if checkpoint.task or checkpoint.reranker else {}),
            "engine": {"name": settings.engine, "version": _engine_version(settings)},
            "source": dict(source),
            "calibration": calibration_record(calibration),
            "settings": {
                "bits": 4,
                "group_size": settings.group_size,
                "clip": settings.clip,
                **({name: getattr(settings, name) for name in NATIVE_ONLY} if settings.engine == "native" else {}),
                "seed": seed,
                **({"token_table": settings.token_table} if settings.token_table == INT8 else {}),
            },
            **({"token_table": token_table_record(settings, report)} if settings.token_table == INT8 else {}),
            "fidelity": fidelity_record(report),
            FLOAT16: float16.record(report),
            "files": {
                str(path.relative_to(folder)): sha256(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file() and path.relative_to(folder) not in separate
            }
            | {"config.json": hashlib.sha256(config.encode()).hexdigest()},
            "model_card": model_card.digest((folder / model_card.FILE).read_bytes()),
        }
    )


def _engine_version(settings: QuantizationSettings) -> str:
    return metadata.version("autoawq") if settings.engine == "autoawq" else version()


def sealed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """`contents` (JSON types) with the hash of all other fields in the field OWN_HASH."""
    others = {name: value for name, value in contents.items() if name != OWN_HASH}
    canonical = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return {**others, OWN_HASH: hashlib.sha256(canonical.encode()).hexdigest()}


def is_sealed(contents: Mapping[str, Any]) -> bool:
    """Whether no field of `contents` has changed since `sealed` returned it."""
    return contents.get(OWN_HASH) == sealed(contents)[OWN_HASH]


def source_record(source: Checkpoint, output: Path) -> dict[str, Any]:
    """Name, folder and weight hashes of the source checkpoint; `qembed eval` finds the source by it.

    The folder is relative to `output`, so both can move together and the manifest does not reveal the user's paths.
    """
    record: dict[str, Any] = {"model": source.name}
    if source.name != SAMPLE and "/" not in source.name:
        record["folder"] = os.path.relpath(source.folder.resolve(), output.resolve())
    record["sha256"] = {path.name: sha256(path) for path in sorted(set(source.files.values()))}
    return record


def calibration_record(calibration: Calibration) -> dict[str, Any]:
    """Source and size of the calibration. `texts` excludes the held-out ones; `cut` counts texts longer than `max_tokens`,
    `shortened` those shortened further to keep within the token budget.
    """
    return {
        "source": calibration.source,
        "sha256": calibration.sha256,
        "texts": len(calibration.rows) - len(calibration.check),
        "tokens": calibration.tokens,
        "max_tokens": calibration.max_tokens,
        "cut": calibration.cut,
        "shortened": calibration.shortened,
    }


def fidelity_record(report: Report) -> dict[str, Any]:
    """Cosine similarity between the INT4 and the original vectors of the held-out texts, of a reranker between last states.

    A reranker also has the mean and the largest difference of scores, and Kendall's tau of the order of a query's documents
    (None if no query has two documents with different scores).
    """
    cosines = sorted(report.cosines)
    record: dict[str, Any] = {
        "texts": len(cosines),
        "mean_cosine": round(statistics.fmean(cosines), 6),
        "min_cosine": round(cosines[0], 6),
    }
    if report.scores:
        differences = [abs(original - int4) for original, int4 in report.scores]
        record["mean_score_difference"] = round(statistics.fmean(differences), 6)
        record["max_score_difference"] = round(max(differences), 6)
        record["kendall_tau"] = _kendall_tau(report)
    return record


def _kendall_tau(report: Report) -> float | None:
    """Of the pairs of documents of a query that the original tells apart: the share in its order less the share out of it."""
    signs: list[int] = []
    for (query, (score, score_int4)), (other_query, (other, other_int4)) in combinations(
        zip(report.queries, report.scores, strict=True), 2
    ):
        if query == other_query and score != other:
            change = (score - other) * (score_int4 - other_int4)
            signs.append((change > 0) - (change < 0))
    return round(statistics.fmean(signs), 6) if signs else None


def task_of(checkpoint: Checkpoint) -> Task:
    """What the checkpoint is for."""
    return "embed" if checkpoint.reranker is None else "rerank"


def token_table_record(settings: QuantizationSettings, report: Report) -> dict[str, Any]:
    """Storage type of the token table, and its relative error ‖E − Ê‖ / ‖E‖ (None for float16, which is the source's own)."""
    error = None if report.table_error is None else round(report.table_error, 6)
    return {"stored": settings.token_table, "relative_error": error}
