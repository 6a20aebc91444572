"""Evaluates a candidate against a baseline: both embed the same texts, one after the other. Returns a result
(`eval/result.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.errors import BadInput
from qembed.eval import fidelity, result
from qembed.eval.embedding import Embedder
from qembed.eval.tasks import Task
from qembed.eval.texts import Data, Measured, cut
from qembed.eval.thresholds import Thresholds, judged, verdict
from qembed.text.cleaning import clean
from qembed.text.texts import Text
from qembed.vectors.sources import Side
from qembed.vectors.vector_files import VectorFile

if TYPE_CHECKING:
    from rich.console import Console
    from tokenizers import Tokenizer

Vectors = NDArray[np.floating[Any]]
Embed = Callable[[Sequence[Text]], Vectors]


@dataclass(frozen=True)
class EvaluationSettings:
    """The user's settings as recorded in the result, and the folder for cached vectors (None: no cache)."""

    baseline: str
    thresholds: Thresholds = field(default_factory=Thresholds)
    cache: Path | None = None


@dataclass(frozen=True)
class Reader:
    """Turns texts into model inputs as `qembed serve` and `qembed embed` do: cleaned, queries behind their prompt.

    The tokenizer measures long texts. Without one nothing is cut, and a server refuses texts that are too long.
    """

    prompts: Mapping[str, str]
    tokenizer: Tokenizer | None

    def inputs(self, texts: Sequence[Text], limit: int | None) -> tuple[list[str], Measured | None]:
        """The model inputs of texts, and their lengths if there is a tokenizer."""
        inputs = [_model_input(text, self.prompts) for text in texts]
        if self.tokenizer is None:
            return inputs, None
        measured = cut(inputs, self.tokenizer, limit)
        return measured.texts, measured


def _model_input(text: Text, prompts: Mapping[str, str]) -> str:
    if text.text.strip() and not clean(text.text).strip():
        raise BadInput(f"{text.id}: the text is empty once invisible characters are removed")
    return text.model_input(prompts)


@dataclass(frozen=True)
class SelfScoring:
    """A task that requests vectors itself, from each side in turn (mteb): `score` runs it, `record` combines both scores."""

    name: str
    score: Callable[[Embed], Any]
    record: Callable[[Any, Any], dict[str, Any]]


def compare(
    candidate: Side,
    baseline: Side,
    reader: Reader,
    data: Data,
    settings: EvaluationSettings,
    progress: Console,
    tasks: Sequence[Task] = (),
    self_scoring: Sequence[SelfScoring] = (),
) -> dict[str, Any]:
    """The result of `candidate` against `baseline` on the texts of `data`, and on `tasks`.

    Raises:
        BadInput: the vectors of both sides differ in length, or stored vectors do not belong to the texts.
        QembedError: a side cannot be started, or fails.
    """
    sides = {"candidate": candidate, "baseline": baseline}
    for side in sides.values():
        if side.file is not None:
            side.file.of(data.texts)
    parts = [("texts", data.texts), *((task.name, task.texts) for task in tasks)]
    limit = min((side.limit for side in sides.values() if side.limit is not None), default=None)
    inputs = [reader.inputs(texts, limit) for _, texts in parts]
    found: dict[str, list[Vectors]] = {}
    scores: dict[str, list[Any]] = {}
    told: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        if side.file is not None:
            found[name], told[name] = [side.file.of(data.texts)], _described(side.file)
            continue
        with _telling(reader, limit, inputs), Embedder(side, name, settings.cache, progress) as embedder:
            found[name] = [embedder.vectors(some, what) for (what, _), (some, _) in zip(parts, inputs, strict=True)]

            def embed(texts: Sequence[Text], asked: Embedder = embedder) -> Vectors:
                return asked.vectors(reader.inputs(texts, limit)[0], "texts of a task")

            scores[name] = [task.score(embed) for task in self_scoring]
            told[name] = embedder.told()
    _check_dimensions(found, told)
    with progress.status("comparing"):
        measured = inputs[0][1]
        results = result.results(data.texts, found["candidate"][0], found["baseline"][0], measured.tokens if measured else None)
    records = []
    for task, left, right in zip(tasks, found["candidate"][1:], found["baseline"][1:], strict=True):
        with progress.status(f"{task.name}: measuring"):
            record = task.record(task.measure(left, right))
        unusable = {side: int((~fidelity.usable(one)).sum()) for side, one in (("candidate", left), ("baseline", right))}
        records.append({**record, "unusable": unusable})
    records += [
        task.record(left, right)
        for task, left, right in zip(self_scoring, scores.get("candidate", []), scores.get("baseline", []), strict=True)
    ]
    thresholds = settings.thresholds
    return {
        **result.surroundings(),
        **{name: told[name] for name in sides},
        "data": {
            "file": data.path.name,
            "sha256": data.sha256,
            "texts": len(data.texts),
            "limit": limit,
            "cut": measured.cut if measured else 0,
            "duplicates": _repeated(data.texts),
        },
        "settings": {
            "baseline": settings.baseline,
            "min_cosine": thresholds.min_cosine,
            "min_p1": thresholds.min_p1,
            "max_task_drop": thresholds.max_task_drop,
            "percentiles": fidelity.PERCENTILE_METHOD,
            "interval": bootstrap.LEVEL,
            "resamples": bootstrap.RESAMPLES,
        },
        "results": results,
        "tasks": records,
        "speed": None,
        "gate": [task.record() for task in judged(records, thresholds)],
        "verdict": verdict(results, records, thresholds),
    }


@contextmanager
def _telling(reader: Reader, limit: int | None, inputs: Sequence[tuple[Sequence[str], Measured | None]]) -> Iterator[None]:
    """If nothing could be cut and a server refuses a text, add advice to the error."""
    try:
        yield
    except BadInput as error:
        whole = reader.tokenizer is None and limit is not None
        if whole and any(len(text.encode()) > limit for texts, _ in inputs for text in texts):  # type: ignore[operator]
            raise BadInput(
                f"{error}; with --model, the checkpoint that is served, texts over {limit} tokens are cut for both sides"
            ) from error
        raise


def _check_dimensions(found: Mapping[str, Sequence[Vectors]], told: Mapping[str, Mapping[str, Any]]) -> None:
    left, right = (found[name][0].shape[1] for name in ("candidate", "baseline"))
    if left != right:
        raise BadInput(
            f"the two sides cannot be compared: {told['candidate']['model']} has {left} dimensions,"
            f" {told['baseline']['model']} has {right}"
        )


def _repeated(texts: Sequence[Text]) -> int:
    """The number of texts that occurred before with the same prompt."""
    return len(texts) - len(Counter((text.kind == "query", text.instruction, text.text) for text in texts))


def _described(file: VectorFile) -> dict[str, Any]:
    """The description of a side whose vectors come from a file."""
    unknown = dict.fromkeys(("version", "weights", "device", "kernel", "url", "bytes", "seconds"))
    return {**unknown, "engine": "file", "model": file.path.name, "dtype": file.dtype, "computed": 0, "from_cache": 0}
