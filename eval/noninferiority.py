"""Whether a task's main number falls by more than a margin: a non-inferiority test by confidence interval.

The 95% interval of the paired difference (candidate − baseline, `qembed.bootstrap`) is compared with −margin, as in trials of
non-inferiority (Piaggio et al. 2012, CONSORT extension, figure 1; one-sided 2.5%): if the whole interval is above, the
candidate is not worse; if the whole interval is below, it is worse; otherwise there are too few texts to tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["worse", "not worse", "too few texts to tell"]
WORSE: Verdict = "worse"
NOT_WORSE: Verdict = "not worse"
TOO_FEW: Verdict = "too few texts to tell"
MOST_TEXTS = 10**9
"""More than anybody measures."""


@dataclass(frozen=True)
class TaskVerdict:
    """The verdict on a task's main metric.

    `drop` and its 95% `interval` are shares of the baseline's value (absolute where that is 0 or less); None if undefined.
    `texts` were measured (queries, pairs, or texts); `texts_needed` would tell if the drop stays what it is: the interval
    narrows with the root of their number. None: they tell already, or no number would.
    """

    task: str
    data: str
    metric: str
    verdict: Verdict
    drop: float | None
    interval: tuple[float, float] | None
    texts: int
    texts_needed: int | None

    def record(self) -> dict[str, Any]:
        """The entry in the result."""
        return asdict(self)


def judge(task: Mapping[str, Any], metric: Mapping[str, Any], margin: float) -> TaskVerdict:
    """The verdict on a task's record and its main metric; `margin` is the largest drop, as a share of the baseline's value."""
    baseline, candidate, interval = metric["baseline"], metric["candidate"], metric["interval"]
    texts = int(metric["count"] or 0)
    names = task["task"], task["data"]["name"], metric["name"]
    if baseline is None or candidate is None:
        lost = baseline is not None  # a number that only the candidate lacks is a loss
        return TaskVerdict(*names, WORSE if lost else TOO_FEW, None, None, texts, None)
    scale = float(baseline) if baseline > 0 else 1.0
    drop = float(baseline - candidate) / scale
    if interval is None:
        return TaskVerdict(*names, TOO_FEW, drop, None, texts, None)
    low, high = (-float(end) / scale for end in reversed(interval))
    verdict = NOT_WORSE if high <= margin else WORSE if low > margin else TOO_FEW
    needed = texts_needed(drop, (low, high), margin, texts) if verdict == TOO_FEW else None
    return TaskVerdict(*names, verdict, drop, (low, high), texts, needed)


def texts_needed(drop: float, interval: tuple[float, float], margin: float, texts: int) -> int | None:
    """The number of texts whose interval would lie on one side of `margin`; None if `drop` is as good as the margin."""
    distance = abs(drop - margin)
    half = max(drop - interval[0], interval[1] - drop)
    if half**2 * texts > distance**2 * MOST_TEXTS:
        return None
    return max(texts + 1, math.ceil(texts * (half / distance) ** 2))
