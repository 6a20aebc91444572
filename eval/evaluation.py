"""Evaluates a candidate against a baseline: both embed the same texts, one after the other. Returns a result
(`eval/result.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.command.progress import reporter
from qembed.errors import BadInput
from qembed.eval import fidelity, result
from qembed.eval.embedding import Embedder
from qembed.eval.tasks import Task
from qembed.eval.texts import Data, Measured, cut
from qembed.eval.thresholds import Thresholds, judged, verdict
from qembed.text.cleaning import clean
from qembed.text.texts import Text
from qembed.vectors.matching import Match, VectorFile, match
from qembed.vectors.sources import Side

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

    The tokenizer measures long texts. Without one nothing is cut, and a server refuses texts that are too long. `default` is
    the prompt of texts that are no queries.
    """

    prompts: Mapping[str, str]
    tokenizer: Tokenizer | None
    default: str = ""

    def inputs(self, texts: Sequence[Text], limit: int | None) -> tuple[list[str], Measured | None]:
        """The model inputs of texts, and their lengths if there is a tokenizer."""
        inputs = [_model_input(text, self.prompts, self.default) for text in texts]
        if self.tokenizer is None:
            return inputs, None
        measured = cut(inputs, self.tokenizer, limit)
        return measured.texts, measured


def _model_input(text: Text, prompts: Mapping[str, str], default: str) -> str:
    if text.text.strip() and not clean(text.text).strip():
        raise BadInput(f"{text.id}: the text is empty once invisible characters are removed")
    return text.model_input(prompts, default)


@dataclass(frozen=True)
class SelfScoring:
    """A task that requests vectors itself, from each side in turn (mteb): `score` runs it, `record` combines both scores."""

    name: str
    score: Callable[[Embed], Any]
    record: Callable[[Any, Any], dict[str, Any]]


@dataclass(frozen=True)
class Embedded:
    """What a side gives: the vectors [n, d] of the texts and of each task, the scores of tasks that request vectors
    themselves, and its description for the result.
    """

    vectors: Sequence[Vectors]
    scores: Sequence[Any]
    description: Mapping[str, Any]


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
        BadInput: the vectors of both sides differ in length, or vectors from a file do not belong to the texts.
        QembedError: a side cannot be started, or fails.
    """
    files = {name: side.file for name, side in (("candidate", candidate), ("baseline", baseline)) if side.file is not None}
    matched = match(data.texts, files)
    data = replace(data, texts=matched.texts)
    parts = [Part("texts", data.texts), *(Part(task.name, task.texts) for task in tasks)]
    limit = min((side.limit for side in (candidate, baseline) if side.limit is not None), default=None)
    inputs = [reader.inputs(part.texts, limit) for part in parts]
    embedding = Embedding(reader, limit, parts, inputs, self_scoring, matched.vectors)
    left = _embedded(candidate, "candidate", embedding, settings, progress)
    right = _embedded(baseline, "baseline", embedding, settings, progress)
    _check_dimensions(left, right)
    measured = embedding.inputs[0][1]
    with reporter("comparing", progress):
        results = result.results(data.texts, left.vectors[0], right.vectors[0], measured.tokens if measured else None)
    records = [*_task_records(tasks, left, right, progress), *_self_scored_records(self_scoring, left, right)]
    return {
        **result.surroundings(),
        "candidate": left.description,
        "baseline": right.description,
        "data": _data_record(data, limit, measured, matched),
        "settings": _settings_record(settings),
        "results": results,
        "tasks": records,
        "speed": None,
        "gate": [task.record() for task in judged(records, settings.thresholds)],
        "verdict": verdict(results, records, settings.thresholds),
    }


@dataclass(frozen=True)
class Part:
    """Texts that are embedded together, and their label on the progress bar."""

    label: str
    texts: Sequence[Text]


@dataclass(frozen=True)
class Embedding:
    """What both sides embed: `parts` with their model inputs (and lengths), and the tasks that request vectors themselves.

    `stored` are the vectors of the first part for each side that has them in a file, by the side's name.
    """

    reader: Reader
    limit: int | None
    parts: Sequence[Part]
    inputs: Sequence[tuple[Sequence[str], Measured | None]]
    self_scoring: Sequence[SelfScoring]
    stored: Mapping[str, Vectors]


def _embedded(side: Side, name: str, embedding: Embedding, settings: EvaluationSettings, progress: Console) -> Embedded:
    """Open a side, embed everything, and close it."""
    if side.file is not None:
        return Embedded([embedding.stored[name]], [], _described(side.file))
    reader, limit = embedding.reader, embedding.limit
    with _advising(reader, limit, embedding.inputs), Embedder(side, name, settings.cache, progress) as embedder:

        def embed(texts: Sequence[Text]) -> Vectors:
            return embedder.vectors(reader.inputs(texts, limit)[0], "texts of a task")

        vectors = [
            embedder.vectors(inputs, part.label) for part, (inputs, _) in zip(embedding.parts, embedding.inputs, strict=True)
        ]
        scores = [task.score(embed) for task in embedding.self_scoring]
        return Embedded(vectors, scores, embedder.description())


def _task_records(tasks: Sequence[Task], left: Embedded, right: Embedded, progress: Console) -> Iterator[dict[str, Any]]:
    for task, candidate, baseline in zip(tasks, left.vectors[1:], right.vectors[1:], strict=True):
        with reporter(f"{task.name}: measuring", progress):
            record = task.record(task.measure(candidate, baseline))
        sides = {"candidate": candidate, "baseline": baseline}
        yield {**record, "unusable": {name: int((~fidelity.usable(side)).sum()) for name, side in sides.items()}}


def _self_scored_records(tasks: Sequence[SelfScoring], left: Embedded, right: Embedded) -> Iterator[dict[str, Any]]:
    for task, candidate, baseline in zip(tasks, left.scores, right.scores, strict=True):
        yield task.record(candidate, baseline)


def _data_record(data: Data, limit: int | None, measured: Measured | None, matched: Match) -> dict[str, Any]:
    return {
        "file": data.path.name,
        "sha256": data.sha256,
        "texts": len(data.texts),
        "limit": limit,
        "cut": measured.cut if measured else 0,
        "duplicates": _repeated(data.texts),
        "without_vector": dict(matched.without_vector),
        "unused_vectors": dict(matched.unused),
    }


def _settings_record(settings: EvaluationSettings) -> dict[str, Any]:
    return {
        "baseline": settings.baseline,
        "min_cosine": settings.thresholds.min_cosine,
        "min_p1": settings.thresholds.min_p1,
        "max_task_drop": settings.thresholds.max_task_drop,
        "percentiles": fidelity.PERCENTILE_METHOD,
        "interval": bootstrap.LEVEL,
        "resamples": bootstrap.RESAMPLES,
    }


@contextmanager
def _advising(reader: Reader, limit: int | None, inputs: Sequence[tuple[Sequence[str], Measured | None]]) -> Iterator[None]:
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


def _check_dimensions(left: Embedded, right: Embedded) -> None:
    dimensions = [side.vectors[0].shape[1] for side in (left, right)]
    if dimensions[0] != dimensions[1]:
        raise BadInput(
            f"the two sides cannot be compared: {left.description['model']} has {dimensions[0]} dimensions,"
            f" {right.description['model']} has {dimensions[1]}"
        )


def _repeated(texts: Sequence[Text]) -> int:
    """The number of texts that occurred before with the same prompt."""
    return len(texts) - len(Counter((text.kind == "query", text.instruction, text.text) for text in texts))


def _described(file: VectorFile) -> dict[str, Any]:
    """The description of a side whose vectors come from a file."""
    unknown = dict.fromkeys(("version", "weights", "device", "kernel", "url", "bytes", "seconds"))
    return {**unknown, "engine": "file", "model": file.path.name, "dtype": file.dtype, "computed": 0, "from_cache": 0}
