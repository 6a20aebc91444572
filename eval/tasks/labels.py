"""Metrics of predicted labels: pure functions of arrays of class numbers [n]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.intp]


def accuracy(truth: Labels, predicted: Labels) -> float:
    """The share of correct predictions."""
    return float((truth == predicted).mean())


def macro_f1(truth: Labels, predicted: Labels) -> float:
    """The mean over classes of F₁ = 2·hits / (true + predicted counts); classes without either are left out."""
    classes = int(max(truth.max(), predicted.max())) + 1
    hits = np.bincount(truth[truth == predicted], minlength=classes)
    sizes = np.bincount(truth, minlength=classes) + np.bincount(predicted, minlength=classes)
    present = sizes > 0
    return float((2 * hits[present] / sizes[present]).mean())
