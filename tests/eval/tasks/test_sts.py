"""Semantic textual similarity against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qembed.errors import BadInput
from qembed.eval.tasks import sts
from qembed.eval.tasks.sts import Pairs
from qembed.text.texts import Text
from tests.eval.tasks.conftest import metric_named

RANDOM = np.random.default_rng(2)


def test_sts_equals_scipys_spearman() -> None:
    count = 40
    first, second = RANDOM.normal(size=(2, count, 8))
    noisy = first + RANDOM.normal(size=first.shape)
    scores = RANDOM.integers(0, 6, count).astype(float)
    texts = [Text(str(row), str(row), "document", "de" if row < 25 else "en") for row in range(count)]
    task = sts.task(Pairs("p", "0", texts, texts, scores.tolist()))
    outcome = task.measure(np.concatenate([noisy, second]), np.concatenate([first, second]))

    def expected(left: np.ndarray, rows: slice) -> float:
        cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(left, second, strict=True)]
        return float(stats.spearmanr(np.array(cosines)[rows], scores[rows]).statistic)

    for group, rows in ((None, slice(None)), ("de", slice(25)), ("en", slice(25, None))):
        metric = metric_named(outcome, "Spearman", group)
        assert metric.baseline == pytest.approx(expected(first, rows))
        assert metric.candidate == pytest.approx(expected(noisy, rows))
        assert metric.main is (group is None)


def test_pairs_that_cannot_be_ranked_are_refused_or_left_out() -> None:
    texts = [Text(str(row), "x") for row in range(4)]
    with pytest.raises(BadInput, match="all 4 pairs have the same score"):
        sts.task(Pairs("p.csv", "0", texts, texts, [1.0] * 4))
    with pytest.raises(BadInput, match="2 pairs; at least three"):
        sts.task(Pairs("p.csv", "0", texts[:2], texts[:2], [1.0, 2.0]))
    vectors = RANDOM.normal(size=(8, 3))
    broken = vectors.copy()
    broken[2] = np.nan
    outcome = sts.task(Pairs("p", "0", texts, texts, [1.0, 2, 3, 4])).measure(broken, vectors)
    assert metric_named(outcome, "Spearman").count == 3
    assert outcome.notes == ["left out: 1 pair without a cosine on either side"]
