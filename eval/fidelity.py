"""The distance between two sets of vectors of the same texts: pure functions of numpy arrays.

Rows are texts. A cosine is undefined if a vector on either side is zero or not finite. It is then NaN, counted in
`Summary.undefined`, and excluded from the other numbers of a summary. A verdict must fail if any cosine is undefined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.eval import arrays

PERCENTILE_METHOD: Final = "linear"
BLOCK_ROWS = 4096
Label = TypeVar("Label", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """Summary statistics of cosines; None if no cosine is defined.

    `p5` and `p1` are the 5th and 1st percentile with linear interpolation (numpy's method "linear"). `count` is the number of
    texts, including undefined ones. `interval` is the 95% interval of the mean (`qembed.bootstrap`); None for fewer than two
    defined cosines.
    """

    count: int
    undefined: int
    mean: float | None
    median: float | None
    p5: float | None
    p1: float | None
    minimum: float | None
    interval: bootstrap.Interval | None


def cosines(candidate: NDArray[np.floating[Any]], baseline: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The cosine [n] float64 of each row of two arrays [n, d], within −1…1, or NaN if undefined.

    Raises:
        ValueError: the shapes differ.
    """
    if candidate.shape != baseline.shape or candidate.ndim != 2:
        raise ValueError(f"two arrays [texts, dimensions] of one shape are needed, not {candidate.shape} and {baseline.shape}")
    values = np.empty(len(candidate))
    for block in row_blocks(len(candidate)):
        values[block] = np.einsum("nd,nd->n", unit(candidate[block]), unit(baseline[block]))
    return values.clip(-1.0, 1.0)


def cosines_at(
    candidate: NDArray[np.floating[Any]], baseline: NDArray[np.floating[Any]], dimension: int
) -> NDArray[np.float64]:
    """The cosine [n] float64 of the first `dimension` elements, as for Matryoshka (MRL) vectors of that length.

    Raises:
        ValueError: `dimension` is not within 1…d, or the shapes differ.
    """
    if not 1 <= dimension <= candidate.shape[1]:
        raise ValueError(f"dimension {dimension} is not within 1…{candidate.shape[1]}")
    return cosines(candidate[:, :dimension], baseline[:, :dimension])


def summarize(values: NDArray[np.float64]) -> Summary:
    """Summary of `values` [n]; NaN is an undefined cosine."""
    return summarize_columns(values[:, None])[0]


def summarize_columns(values: NDArray[np.float64]) -> list[Summary]:
    """A summary of each column of `values` [n, k].

    Columns with NaN in the same rows, as is usual for the dimensions of the same texts, share bootstrap draws.
    """
    summaries: dict[int, Summary] = {}
    patterns: dict[bytes, list[int]] = {}
    for column in range(values.shape[1]):
        patterns.setdefault(np.isfinite(values[:, column]).tobytes(), []).append(column)
    for columns in patterns.values():
        defined = values[np.isfinite(values[:, columns[0]])][:, columns]
        for position, interval in enumerate(bootstrap.of_means(defined)):
            summaries[columns[position]] = replace(_summary(len(values), defined[:, position]), interval=interval)
    return [summaries[column] for column in range(values.shape[1])]


def _summary(count: int, defined: NDArray[np.float64]) -> Summary:
    undefined = count - len(defined)
    if not len(defined):
        return Summary(count, undefined, None, None, None, None, None, None)
    median, p5, p1 = np.percentile(defined, [50, 5, 1], method=PERCENTILE_METHOD)
    return Summary(
        count=count,
        undefined=undefined,
        mean=float(defined.mean()),
        median=float(median),
        p5=float(p5),
        p1=float(p1),
        minimum=float(defined.min()),
        interval=None,
    )


def summarize_by(values: NDArray[np.float64], labels: Sequence[Label]) -> dict[Label, Summary]:
    """A summary per label, in order of first appearance; `labels` has one label per value.

    Raises:
        ValueError: the numbers of labels and values differ.
    """
    if len(labels) != values.size:
        raise ValueError(f"{len(labels)} labels for {values.size} values")
    rows: dict[Label, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return {label: summarize(values[chosen]) for label, chosen in rows.items()}


def worst(values: NDArray[np.float64], count: int) -> list[int]:
    """Row numbers of the `count` lowest cosines, undefined ones first, then ascending; ties keep row order."""
    keys = np.where(np.isnan(values), -np.inf, values)
    return [int(row) for row in np.argsort(keys, kind="stable")[:count]]


def not_finite(vectors: NDArray[np.floating[Any]]) -> int:
    """Number of rows that contain NaN or infinity."""
    return sum(int((~np.isfinite(vectors[block])).any(axis=1).sum()) for block in row_blocks(len(vectors)))


def zero(vectors: NDArray[np.floating[Any]]) -> int:
    """Number of rows of length zero."""
    return sum(int((~vectors[block].any(axis=1)).sum()) for block in row_blocks(len(vectors)))


def duplicates(vectors: NDArray[np.floating[Any]], texts: Sequence[str]) -> int:
    """Number of rows equal, bit by bit, to an earlier vector of another text; repeated texts do not count."""
    first_texts: dict[bytes, str] = {}
    count = 0
    for row, text in zip(vectors, texts, strict=True):
        first = first_texts.setdefault(hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest(), text)
        count += first != text
    return count


def usable(vectors: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Mask [n] of rows that are finite and not zero."""
    mask = np.empty(len(vectors), np.bool_)
    for block in row_blocks(len(vectors)):
        mask[block] = np.isfinite(vectors[block]).all(axis=1) & vectors[block].any(axis=1)
    return mask


def unit(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Rows [n, d] scaled to unit length in float64; all NaN for rows that are zero or not finite."""
    wide = vectors.astype(np.float64)
    fit = usable(wide)
    largest = np.abs(np.where(fit[:, None], wide, 0.0)).max(axis=1, initial=0.0)
    # Dividing by the largest element first keeps the squares of tiny and huge rows within range.
    scaled = np.where(fit[:, None], wide, np.nan) / np.where(fit, largest, 1.0)[:, None]
    return np.asarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True), dtype=np.float64)


def unit_or_zero(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Rows [n, d] scaled to unit length in float32; zero, which is near to nothing, for unusable rows."""
    rows, width = vectors.shape
    scaled = arrays.empty((rows, width))
    for block in row_blocks(rows):
        scaled[block] = np.nan_to_num(unit(vectors[block]))
    return scaled


def row_blocks(count: int) -> Iterator[slice]:
    """Slices of rows for block-wise processing, so that there is never a float64 copy of everything."""
    return (slice(start, min(start + BLOCK_ROWS, count)) for start in range(0, count, BLOCK_ROWS))
