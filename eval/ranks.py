"""Spearman's rank correlation: a pure function of numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def spearman(left: NDArray[np.floating[Any]], right: NDArray[np.floating[Any]]) -> float:
    """Spearman's ρ of two arrays [n]: Pearson's correlation of their ranks, with mean ranks for ties; NaN if one is constant.

    Raises:
        ValueError: the shapes differ.
    """
    if left.shape != right.shape:
        raise ValueError(f"two arrays of one shape are needed, not {left.shape} and {right.shape}")
    first, second = (ranks(values) for values in (left, right))
    first -= first.mean()
    second -= second.mean()
    lengths = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / lengths) if lengths else float("nan")


def ranks(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Ranks of `values` [n], from 1; equal values get the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(values))
    result = np.empty(len(values))
    result[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return result
