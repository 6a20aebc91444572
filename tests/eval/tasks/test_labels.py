"""Accuracy and macro-F1 against scikit-learn, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from qembed.eval.tasks import labels

RANDOM = np.random.default_rng(11)


def test_accuracy_and_macro_f1_equal_those_of_scikit_learn() -> None:
    truth, predicted = RANDOM.integers(0, 6, 80), RANDOM.integers(0, 7, 80)
    assert labels.accuracy(truth, predicted) == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert labels.macro_f1(truth, predicted) == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))


def test_macro_f1_by_hand() -> None:
    # Class 0: one hit, true twice, predicted once: 2/3. Class 2: one hit, true once, predicted twice: 2/3. Class 1 is absent.
    assert labels.macro_f1(np.array([0, 0, 2]), np.array([0, 2, 2])) == pytest.approx(2 / 3)
