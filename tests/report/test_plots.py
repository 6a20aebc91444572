"""Plots as SVG."""

from __future__ import annotations

import numpy as np
import pytest

from qembed.eval import result
from qembed.report import plots
from qembed.text.texts import Text


def test_equal_cosines_are_still_plotted() -> None:
    results = result.results([Text("a", "a"), Text("b", "b")], np.ones((2, 4), np.float32), np.ones((2, 4), np.float32))
    assert results["histogram"]["counts"][-1] == 2
    svg = plots.histogram(results["histogram"]["edges"], results["histogram"]["counts"], {"mean": 1.0})
    assert "nan" not in svg
    assert "nan" not in plots.dimensions(results["by_dimension"])


def test_ticks_are_round_numbers_within_the_range() -> None:
    assert plots.ticks(0.93, 1.0) == pytest.approx([0.94, 0.96, 0.98, 1.0])
    assert plots.ticks(-0.05, 0.05, 3) == pytest.approx([-0.05, 0, 0.05])
    assert plots.ticks(0, 10) == pytest.approx([0, 2, 4, 6, 8, 10])
