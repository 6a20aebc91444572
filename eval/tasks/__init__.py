"""What a user feels: tasks on the vectors of both sides, each with its numbers side by side."""

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
    """One number of both sides. `interval` is that of candidate − baseline, on the same rows (paired).

    `mixed` is the baseline's index asked with the candidate's queries, where there is an index. `count` is the number of rows
    (queries, texts, pairs) behind it. `main` is what --max-task-drop looks at.
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
        """As it stands in the result."""
        known = self.baseline is not None and self.candidate is not None
        difference = self.candidate - self.baseline if known else None  # type: ignore[operator]
        return {**asdict(self), "difference": difference}


@dataclass(frozen=True)
class Outcome:
    """What a task found: numbers, and what a reader of them should know."""

    metrics: Sequence[Metric]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """A task, read and checked: the texts that both sides are to embed, and what to do with their vectors [len(texts), d]."""

    name: str
    data: dict[str, Any]
    texts: Sequence[Text]
    measure: Callable[[Vectors, Vectors], Outcome]
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self, outcome: Outcome) -> dict[str, Any]:
        """As it stands in the result."""
        return {
            "task": self.name,
            "data": self.data,
            "settings": self.settings,
            "notes": list(outcome.notes),
            "metrics": [metric.record() for metric in outcome.metrics],
        }
