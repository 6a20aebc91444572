"""Both sides embed the same texts, one side after the other; the result is the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput
from qembed.eval import fidelity, report
from qembed.eval.sources import Side, Source
from qembed.eval.texts import Data, cut

if TYPE_CHECKING:
    from rich.console import Console
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Settings:
    """What the user asked for, as it goes into the report."""

    baseline: str
    min_cosine: float | None


@dataclass(frozen=True)
class Reader:
    """What stands between a text and a model: the prompts by kind, and the tokenizer that long texts are measured with.

    Without a tokenizer nothing is cut, and a server refuses what is too long for it.
    """

    prompts: Mapping[str, str]
    tokenizer: Tokenizer | None


def compare(
    candidate: Side, baseline: Side, reader: Reader, data: Data, settings: Settings, progress: Console
) -> dict[str, Any]:
    """The report of `candidate` against `baseline` on the texts of `data`; its keys stand in `qembed.eval.report`.

    Raises:
        BadInput: the two sides' vectors differ in dimension.
        QembedError: a side cannot be started, or fails.
    """
    inputs = [text.prompted(reader.prompts) for text in data.texts]
    with _opened(candidate, "candidate", progress) as source:
        limit = min((known for known in (source.limit, baseline.limit) if known is not None), default=None)
        shortened = 0
        if reader.tokenizer is not None and limit is not None:
            inputs, shortened = cut(inputs, reader.tokenizer, limit)
        candidate_vectors, candidate_said = _embed(source, inputs, "candidate", progress)
    with _opened(baseline, "baseline", progress) as source:
        baseline_vectors, baseline_said = _embed(source, inputs, "baseline", progress)
    if candidate_vectors.shape[1] != baseline_vectors.shape[1]:
        raise BadInput(
            f"the two sides cannot be compared: {candidate_said['model']} has {candidate_vectors.shape[1]} dimensions,"
            f" {baseline_said['model']} has {baseline_vectors.shape[1]}"
        )
    results = report.results(data.texts, candidate_vectors, baseline_vectors)
    return {
        **report.surroundings(),
        "candidate": candidate_said,
        "baseline": baseline_said,
        "data": {
            "file": data.path.name,
            "sha256": data.sha256,
            "texts": len(data.texts),
            "limit": limit,
            "cut": shortened,
        },
        "settings": {
            "baseline": settings.baseline,
            "min_cosine": settings.min_cosine,
            "percentiles": fidelity.PERCENTILE_METHOD,
        },
        "results": results,
        "verdict": report.verdict(results, settings.min_cosine),
    }


@contextmanager
def _opened(side: Side, name: str, progress: Console) -> Iterator[Source]:
    """The source of a side, with a line that tells how far it is while it opens."""
    with ExitStack() as stack:
        with progress.status(f"{name}: opening") as status:
            source = stack.enter_context(side.open(lambda doing: status.update(f"{name}: {doing}")))
        yield source


def _embed(source: Source, inputs: Sequence[str], side: str, progress: Console) -> tuple[NDArray[np.float32], dict[str, Any]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("texts"), TimeRemainingColumn())
    with Progress(*columns, console=progress) as bar:
        task = bar.add_task(f"{side}: {source.model} through {source.engine}", total=len(inputs))
        started = time.monotonic()
        vectors = source.embed(inputs, lambda done: bar.advance(task, done))
        seconds = time.monotonic() - started
    said = {name: getattr(source, name) for name in ("engine", "model", "weights", "device", "dtype", "url")}
    return vectors, {**said, "seconds": round(seconds, 3)}
