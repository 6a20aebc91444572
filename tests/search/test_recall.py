"""How far the recall of an index is measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qembed.search import recall


@pytest.mark.parametrize(("wanted", "widths"), [(0.95, [1]), (1.0, [1, 2])])
def test_widths_are_measured_until_the_wanted_recall_is_reached(
    wanted: float, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = np.ones((250, 10), np.float32)
    almost = scores.copy()
    almost[0, 9] = 0  # a recall of 0.9996

    def search(*arguments: Any) -> tuple[Any, Any, float]:
        return almost if arguments[-1] == 1 else scores, np.zeros((250, 10), np.int64), 1.0

    monkeypatch.setattr(recall, "_search", search)
    monkeypatch.setattr(recall, "widths", lambda *_: [1, 2, 4])
    index: Any = SimpleNamespace(ntotal=100)
    measured = recall.measure(index, "hnsw", np.zeros((250, 2), np.float32), None, wanted, "", lambda _: None)
    assert [point.width for point in measured.points] == widths
    assert measured.chosen == widths[-1]
