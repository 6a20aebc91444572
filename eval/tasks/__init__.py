"""Tasks on the vectors of both sides, with their metrics side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.bootstrap import Interval
from qembed.text.texts import Text

Vectors = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Metric:
    """A metric of both sides. `interval` is that of candidate − baseline, on the same rows (paired).

    `mixed` is the baseline's index searched with the candidate's queries, if there is an index. `count` is the number of rows
    (queries, texts, pairs). `main` metrics are subject to --max-task-drop.
    """

    name: str
    baseline: float | None
    candidate: float | None
    interval: Interval | None
    count: int
    group: str | None = None
    mixed: float | None = None
    main: bool = False

    def record(self) -> dict[str, Any]:
        """The entry in the result."""
        known = self.baseline is not None and self.candidate is not None
        difference = self.candidate - self.baseline if known else None  # type: ignore[operator]
        return {**asdict(self), "difference": difference}


@dataclass(frozen=True)
class Outcome:
    """The metrics of a task, and notes for the reader."""

    metrics: Sequence[Metric]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """A task with its data: the texts that both sides embed, and what to compute from their vectors [len(texts), d]."""

    name: str
    data: dict[str, Any]
    texts: Sequence[Text]
    measure: Callable[[Vectors, Vectors], Outcome]
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self, outcome: Outcome) -> dict[str, Any]:
        """The entry in the result."""
        return {
            "task": self.name,
            "data": self.data,
            "settings": self.settings,
            "notes": list(outcome.notes),
            "metrics": [metric.record() for metric in outcome.metrics],
        }
