"""Semantic textual similarity: the rank correlation of cosines with the scores that people gave to pairs of texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.errors import BadInput
from qembed.eval import fidelity
from qembed.eval.ranks import spearman
from qembed.eval.tasks import Metric, Outcome, Task, Vectors
from qembed.text.display import counted
from qembed.text.texts import Text


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with human scores [n] on any scale."""

    name: str
    sha256: str
    first: list[Text]
    second: list[Text]
    scores: list[float]


def task(pairs: Pairs) -> Task:
    """The task on `pairs`.

    Raises:
        BadInput: there are fewer than three pairs, or all have the same score, so that nothing can be ranked.
    """
    if len(pairs.scores) < 3:
        raise BadInput(f"{pairs.name}: {counted(len(pairs.scores), 'pair')}; at least three are needed to rank them")
    if len(set(pairs.scores)) < 2:
        raise BadInput(f"{pairs.name}: all {len(pairs.scores)} pairs have the same score, so there is nothing to rank")
    gold = np.array(pairs.scores)
    languages = [text.language for text in pairs.first]

    def measure(candidate: Vectors, baseline: Vectors) -> Outcome:
        sides = [fidelity.cosines(vectors[: len(gold)], vectors[len(gold) :]) for vectors in (baseline, candidate)]
        usable = np.isfinite(sides[0]) & np.isfinite(sides[1])
        undefined = int((~usable).sum())
        notes = [f"left out: {counted(undefined, 'pair')} without a cosine on either side"] if undefined else []
        distinct = sorted({language for language in languages if language})
        metrics = []
        for group in (None, *(distinct if len(distinct) > 1 else [])):
            rows = usable & np.array([group is None or language == group for language in languages])
            metrics.append(_metric(gold[rows], sides[0][rows], sides[1][rows], group))
        return Outcome(metrics, notes)

    return Task(
        name="sts",
        data={"name": pairs.name, "sha256": pairs.sha256, "pairs": len(gold)},
        texts=[*pairs.first, *pairs.second],
        measure=measure,
    )


def _metric(
    gold: NDArray[np.float64], baseline: NDArray[np.float64], candidate: NDArray[np.float64], group: str | None
) -> Metric:
    def difference(rows: NDArray[np.intp]) -> float:
        return spearman(candidate[rows], gold[rows]) - spearman(baseline[rows], gold[rows])

    values = [spearman(side, gold) if len(gold) > 1 else float("nan") for side in (baseline, candidate)]
    finite = [value if np.isfinite(value) else None for value in values]
    interval = bootstrap.of_statistic(difference, len(gold))
    return Metric("Spearman", finite[0], finite[1], interval, len(gold), group, main=group is None)
