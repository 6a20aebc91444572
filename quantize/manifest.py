"""qembed.json, the manifest of a checkpoint: source, calibration, settings, fidelity, and the SHA-256 of each file."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.find import SAMPLE
from qembed.checkpoint.int8_table import INT8
from qembed.files import sha256
from qembed.quantize.calibration import Calibration
from qembed.quantize.settings import QuantizationSettings, Report


def source_record(source: Checkpoint, output: Path) -> dict[str, Any]:
    """Which checkpoint an INT4 one was made from, so that `qembed eval` finds it again, with the hash of its weights.

    A folder is named relative to `output`: the two may move together, and no user's path is published.
    """
    found: dict[str, Any] = {"model": source.name}
    if source.name != SAMPLE and "/" not in source.name:
        found["folder"] = os.path.relpath(source.folder.resolve(), output.resolve())
    found["sha256"] = {path.name: sha256(path) for path in sorted(set(source.files.values()))}
    return found


def record(
    source: Mapping[str, Any],
    calibration: Calibration,
    settings: QuantizationSettings,
    report: Report,
    seed: int,
    folder: Path,
    config: str,
) -> dict[str, Any]:
    """The contents of qembed.json: enough to make the same bytes again, and to tell whether these are they.

    `folder` holds all but config.json, which comes last; `config` is what it is going to say.
    """
    return {
        "qembed": version("qembed"),
        "engine": {"name": settings.engine, "version": version("autoawq" if settings.engine == "autoawq" else "qembed")},
        "source": dict(source),
        "calibration": calibration_record(calibration),
        "settings": {
            "bits": 4,
            "group_size": settings.group_size,
            "clip": settings.clip,
            **(_of_our_own(settings) if settings.engine == "native" else {}),
            "seed": seed,
            **({"token_table": settings.token_table} if settings.token_table == INT8 else {}),
        },
        **({"token_table": token_table(settings, report)} if settings.token_table == INT8 else {}),
        "fidelity": fidelity(report),
        "files": {
            str(path.relative_to(folder)): sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.relative_to(folder) not in (Path(MANIFEST), Path("config.json"))
        }
        | {"config.json": hashlib.sha256(config.encode()).hexdigest()},
    }


def calibration_record(calibration: Calibration) -> dict[str, Any]:
    """What the layers were fitted to. `texts` leaves out those kept apart; `cut` are those longer than `max_tokens`."""
    return {
        "source": calibration.source,
        "sha256": calibration.sha256,
        "texts": len(calibration.rows) - len(calibration.check),
        "tokens": calibration.tokens,
        "max_tokens": calibration.max_tokens,
        "cut": calibration.cut,
    }


def fidelity(report: Report) -> dict[str, Any]:
    """Cosine similarity between the INT4 and the original vectors of the texts that quantization did not see."""
    cosines = sorted(report.cosines)
    return {
        "texts": len(cosines),
        "mean_cosine": round(statistics.fmean(cosines), 6),
        "min_cosine": round(cosines[0], 6),
    }


def token_table(settings: QuantizationSettings, report: Report) -> dict[str, Any]:
    """What the token table is stored as, and its relative error ‖E − Ê‖ / ‖E‖ (null for float16: the source's own)."""
    error = None if report.table_error is None else round(report.table_error, 6)
    return {"stored": settings.token_table, "relative_error": error}


def _of_our_own(settings: QuantizationSettings) -> dict[str, Any]:
    """Settings that AutoAWQ does not have."""
    names = ("scales", "rounding", "target", "inputs", "prefixes", "mixed", "last_share", "refine")
    return {name: getattr(settings, name) for name in names}
