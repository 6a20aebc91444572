"""How far two sets of vectors of the same texts are apart: pure functions of numpy arrays.

Rows are texts. A cosine is undefined where a vector on either side is zero or not finite; it is NaN here, is counted in
`Summary.undefined`, and takes no part in the other numbers of a summary. A verdict must fail if any is undefined.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

MRL_DIMENSIONS = (32, 64, 128, 256, 512, 768, 1024, 2048, 2560, 4096)
PERCENTILE_METHOD: Final = "linear"
Label = TypeVar("Label", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """Cosines in a few numbers; None where no cosine is defined.

    `p5` and `p1` are the values below which 5% and 1% of the cosines lie, interpolated linearly between neighbours in
    rank (numpy's method "linear"). `count` is the number of texts, the undefined ones included.
    """

    count: int
    undefined: int
    mean: float | None
    median: float | None
    p5: float | None
    p1: float | None
    minimum: float | None


def cosines(candidate: NDArray[np.floating[Any]], baseline: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The cosine [n] float64 of each row of two [n, d] arrays, NaN where it is undefined, else within −1…1.

    Raises:
        ValueError: the shapes differ.
    """
    if candidate.shape != baseline.shape or candidate.ndim != 2:
        raise ValueError(f"two arrays [texts, dimensions] of one shape are needed, not {candidate.shape} and {baseline.shape}")
    left, right = _unit(candidate), _unit(baseline)
    products: NDArray[np.float64] = np.einsum("nd,nd->n", left, right)
    return products.clip(-1.0, 1.0)


def cosines_at(
    candidate: NDArray[np.floating[Any]], baseline: NDArray[np.floating[Any]], dimension: int
) -> NDArray[np.float64]:
    """The cosine [n] float64 of the first `dimension` elements: what Matryoshka (MRL) vectors of that length would have.

    Raises:
        ValueError: `dimension` is not within 1…d, or the shapes differ.
    """
    if not 1 <= dimension <= candidate.shape[1]:
        raise ValueError(f"dimension {dimension} is not within 1…{candidate.shape[1]}")
    return cosines(candidate[:, :dimension], baseline[:, :dimension])


def mrl_dimensions(full: int) -> list[int]:
    """The dimensions to look at for vectors of length `full`: the usual ones below it, and `full` itself."""
    return [dimension for dimension in MRL_DIMENSIONS if dimension < full] + [full]


def summarize(values: NDArray[np.float64]) -> Summary:
    """The numbers of `values` [n], NaN standing for an undefined cosine."""
    defined = values[np.isfinite(values)]
    undefined = int(values.size - defined.size)
    if not defined.size:
        return Summary(int(values.size), undefined, None, None, None, None, None)
    median, p5, p1 = np.percentile(defined, [50, 5, 1], method=PERCENTILE_METHOD)
    return Summary(
        count=int(values.size),
        undefined=undefined,
        mean=float(defined.mean()),
        median=float(median),
        p5=float(p5),
        p1=float(p1),
        minimum=float(defined.min()),
    )


def summarize_by(values: NDArray[np.float64], labels: Sequence[Label]) -> dict[Label, Summary]:
    """A summary for each label, in the order of their first appearance; `labels` has one for each value.

    Raises:
        ValueError: there are more labels than values, or fewer.
    """
    if len(labels) != values.size:
        raise ValueError(f"{len(labels)} labels for {values.size} values")
    rows: dict[Label, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return {label: summarize(values[chosen]) for label, chosen in rows.items()}


def worst(values: NDArray[np.float64], count: int) -> list[int]:
    """Row numbers of the `count` lowest cosines, undefined ones first, then upwards; ties keep the order of the rows."""
    keys = np.where(np.isnan(values), -np.inf, values)
    return [int(row) for row in np.argsort(keys, kind="stable")[:count]]


def not_finite(vectors: NDArray[np.floating[Any]]) -> int:
    """How many rows hold a NaN or an infinity."""
    return int((~np.isfinite(vectors)).any(axis=1).sum())


def zero(vectors: NDArray[np.floating[Any]]) -> int:
    """How many rows have no length at all."""
    return len(vectors) - int(np.count_nonzero(vectors.any(axis=1)))


def _unit(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Rows scaled to unit length in float64; NaN throughout a row that is zero or not finite."""
    wide = vectors.astype(np.float64)
    usable = np.asarray(np.isfinite(wide).all(axis=1))
    largest = np.abs(np.where(usable[:, None], wide, 0.0)).max(axis=1, initial=0.0)
    usable = usable & (largest > 0)
    # Dividing by the largest element first keeps the squares of tiny and huge rows within range.
    scaled = np.where(usable[:, None], wide, np.nan) / np.where(usable, largest, 1.0)[:, None]
    return np.asarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True), dtype=np.float64)
