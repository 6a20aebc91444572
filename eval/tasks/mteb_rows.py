"""The rows behind a main score of mteb, for bootstrap intervals: mteb itself reports one number per set.

The rows come from the predictions that mteb writes. They are used only if they reproduce mteb's own score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.eval.ranks import spearman
from qembed.eval.tasks import ranking

SAME = 1e-4
RANKED = {"ndcg": ranking.ndcg, "map": ranking.average_precision, "recall": ranking.recall}
SPEARMAN = ("cosine_spearman", "spearman")
RANKED_NAME = re.compile(r"^(ndcg|map|recall)_at_(\d+)$")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Values [n] of queries, texts or pairs. The score is their mean, or Spearman's ρ with human scores (`gold` [n])."""

    values: Floats
    gold: Floats | None = None

    def score(self, drawn: NDArray[np.intp] | slice = slice(None)) -> float:
        """The score of the resampled rows."""
        values = self.values[drawn]
        return float(values.mean()) if self.gold is None else spearman(values, self.gold[drawn])


def read(predicted: Any, data: Any, task: Any, score: float) -> Rows | None:
    """The rows behind the `score` of a part of a task, from mteb's predictions and the task's `data`; None if unknown.

    Supported: retrieval and reranking (nDCG, mAP, recall), classification (accuracy) and STS (Spearman).
    """
    name = str(task.metadata.main_score)
    try:
        if ranked := RANKED_NAME.match(name):
            rows = Rows(_ranked(predicted, data["relevant_docs"], task, RANKED[ranked[1]], int(ranked[2])))
        elif name == "accuracy":
            right = np.array(predicted) == np.array(data[task.label_column_name])
            rows = Rows(right.mean(axis=0).astype(np.float64))  # over mteb's repetitions, each with other texts to train on
        elif name in SPEARMAN:
            rows = Rows(np.array(predicted["cosine_scores"], np.float64), np.array(data["score"], np.float64))
        else:
            return None
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    return rows if abs(rows.score() - score) < SAME else None


def interval(candidate: Sequence[Rows], baseline: Sequence[Rows]) -> bootstrap.Interval | None:
    """The interval of candidate − baseline if the score is a mean over parts, with rows resampled in pairs."""

    def of_part(left: Rows, right: Rows) -> Callable[[NDArray[np.intp]], float]:
        return lambda drawn: left.score(drawn) - right.score(drawn)

    pairs = list(zip(candidate, baseline, strict=True))
    if any(len(left.values) != len(right.values) for left, right in pairs):
        return None
    return bootstrap.of_strata([(of_part(left, right), len(left.values)) for left, right in pairs])


def _ranked(
    predicted: Mapping[str, Mapping[str, float]],
    relevant: Mapping[str, Mapping[str, int]],
    task: Any,
    score: Callable[[Floats, Sequence[Sequence[int]], int], Floats],
    depth: int,
) -> Floats:
    """The score of each query, from the scores of its documents."""
    queries = [query for query, grades in relevant.items() if any(grade > 0 for grade in grades.values())]
    gains = np.zeros((len(queries), depth))
    for row, query in enumerate(queries):
        scores = predicted.get(query, {})
        ignored = query if getattr(task, "ignore_identical_ids", False) else None
        best = sorted((document for document in scores if document != ignored), key=lambda name: -scores[name])[:depth]
        gains[row, : len(best)] = [max(0, relevant[query].get(document, 0)) for document in best]
    return score(gains, [[grade for grade in relevant[query].values() if grade > 0] for query in queries], depth)
