"""What a checkpoint says of itself: qembed.json for programs, README.md (the model card) for people."""

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
from qembed.checkpoint.int8_table import INT8, QUANT_METHOD
from qembed.checkpoint.model_card import section
from qembed.files import sha256
from qembed.quantize.calibration import Calibration
from qembed.quantize.settings import QuantizationSettings, Report

OF_AWQ = {"for bare paragraphs": "0.41", "under PromptEOL": "0.64", "in KL divergence": "0.61"}
"""From bench/RESULTS.md, "Quality of INT4: a language model"."""


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


def model_card(source: Checkpoint, settings: QuantizationSettings, calibration: Calibration, report: Report, size: int) -> str:
    """README.md of the checkpoint: what it is, how near it is to its source, how to use it."""
    base = f"base_model: {source.name}\nbase_model_relation: quantized\n" if "/" in source.name else ""
    licence = _licence(source)
    note = (
        "\nThe source is qembed's embedded sample, made to try the tools with. It is not for production.\n"
        if source.name == SAMPLE
        else ""
    )
    library, contents, loading = _format(settings, report, size)
    return f"""---
{licence}{base}library_name: {library}
pipeline_tag: feature-extraction
tags: [awq, int4, embeddings, qembed]
---

# {source.name.split("/")[-1]}, AWQ INT4

The linear layers of `{source.name}` in 4 bits (AWQ, GEMM layout, groups of {settings.group_size}, with zero points), {contents}
{note}
{section(_nearness(report))}

## How to use it

```
qembed serve --model FOLDER
```

{loading} Queries go in as `Instruct: {{task}}\\nQuery:{{query}}`, documents as
they are; vectors are those of the last token, of unit length.

## How it was made

{_method(settings)};
{calibration.tokens:,} tokens of {calibration.source} calibration texts. `qembed.json` has settings, seed and hashes.
{_elsewhere(settings)}"""


def _nearness(report: Report) -> str:
    """What quantization itself measured; `qembed eval --card` puts more in its place."""
    measured = fidelity(report)
    return (
        f"Cosine similarity between the INT4 and the original vectors, computed in float32, on {measured['texts']} texts that"
        f" quantization\ndid not see: mean {measured['mean_cosine']:.4f}, least {measured['min_cosine']:.4f}.\n"
        "`qembed eval --model FOLDER --baseline fp16 --card` measures it on more texts, through vLLM, by\n"
        "language and dimension, and writes what it finds here."
    )


def _elsewhere(settings: QuantizationSettings) -> str:
    """What the same method costs a model that everybody can try it on; nothing where parts of it are switched off."""
    default = QuantizationSettings()
    parts = ("engine", "scales", "clip", "rounding", "target", "inputs")
    if any(getattr(settings, part) != getattr(default, part) for part in parts):
        return ""
    shares = ", ".join(f"{share} {what}" for what, share in OF_AWQ.items())
    return (
        f"\nWhat this method leaves of plain AWQ's error on SmolLM2-135M, groups of 64 (qembed's bench/RESULTS.md): {shares}.\n"
    )


def _of_our_own(settings: QuantizationSettings) -> dict[str, Any]:
    """Settings that AutoAWQ does not have."""
    names = ("scales", "rounding", "target", "inputs", "prefixes", "mixed", "last_share", "refine")
    return {name: getattr(settings, name) for name in names}


def _method(settings: QuantizationSettings) -> str:
    clipping = "clipping, " if settings.clip else ""
    if settings.engine == "autoawq":
        return f"By the AutoAWQ library, version {version('autoawq')}: AWQ scales, {clipping}nearest rounding"
    fitted = "the original model" if settings.target == "original" else "its own outputs"
    scales = "" if settings.scales == "awq" else " (none)"
    refined = f", refined {settings.refine} times" if settings.refine else ""
    held = ", as far as cross-validation allows" if settings.target == "original" else ""
    return f"AWQ scales{scales}, {clipping}{settings.rounding} rounding, each layer fitted to {fitted}{held}{refined}"


def _format(settings: QuantizationSettings, report: Report, size: int) -> tuple[str, str, str]:
    """For the model card: the library that reads the format, what it holds in how many bytes, and how vLLM loads it."""
    megabytes, written = f"{size / 1e6:,.1f} MB", f"Written by qembed {version('qembed')}"
    if settings.token_table != INT8:
        return (
            "transformers",
            f"everything\nelse in float16: {megabytes}. {written}; vLLM and SGLang read it with nothing else\ninstalled.",
            "or, with vLLM alone: `vllm serve FOLDER --runner pooling`.",
        )
    return (
        "vllm",
        f"the token\ntable in INT8 (relative error {report.table_error:.2%}), everything else in float16: {megabytes}.\n"
        f"{written}.\n\n**It needs qembed's vLLM plugin**: install qembed beside vLLM. Without it vLLM stops with\n"
        f"`Unknown quantization method: {QUANT_METHOD}`. SGLang and transformers cannot read it; `qembed quantize\n"
        "--token-table float16` writes what they can.",
        "or, in the same environment: `vllm serve FOLDER --runner pooling`.",
    )


def _licence(source: Checkpoint) -> str:
    """The licence line that the source's own card has, so that a licence is never invented."""
    card = source.folder / "README.md"
    if source.name == SAMPLE:
        return "license: apache-2.0\n"
    if card.exists():
        for line in card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0].splitlines():
            if line.startswith("license:"):
                return line + "\n"
    return ""
