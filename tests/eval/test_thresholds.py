"""Thresholds on the vectors of a result."""

from __future__ import annotations

from qembed.eval import result
from qembed.eval.thresholds import Thresholds, verdict
from tests.eval.test_result import BASELINE, CANDIDATE, TEXTS


def test_the_threshold_is_the_mean_at_full_dimension() -> None:
    results = result.results(TEXTS, CANDIDATE, BASELINE)
    mean = results["overall"]["mean"]
    assert verdict(results, [], Thresholds(mean)) == {"passed": True, "failures": [], "undecided": []}
    assert verdict(results, [], Thresholds(0.61)) == {
        "passed": False,
        "failures": ["mean cosine at dimension 2 is 0.600000, below --min-cosine 0.61"],
        "undecided": [],
    }
