"""The report of `qembed index` in a real browser, on a phone and on a desktop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qembed.search import report
from tests.eval.report.test_html_browser import BROWSER, CUT_OFF, OVERLAPS, Tab, tab

__all__ = ["tab"]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")


def result(times: list[float], exact: float) -> dict[str, Any]:
    points = [
        {"width": 2**place, "recall": 1 - 0.5 ** (place + 1), "interval": [1 - 0.6 ** (place + 1), 1.0], "first": 0.9,
         "milliseconds": time}
        for place, time in enumerate(times)
    ]  # fmt: skip
    return {
        "index": "a-long-folder/with/" + "index" * 30 + ".faiss", "source": "vectors.parquet", "model": None,
        "kind": "ivf-flat", "settings": {"nlist": 4096}, "rows": 1_234_567, "dimensions": 1024, "bytes": 5_000_000_000,
        "columns": [], "width": 16,
        "recall": {"queries": 200, "source": "drawn", "depth": 10, "wanted": 0.95, "exact": exact, "chosen": 16,
                   "points": points},
    }  # fmt: skip


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("exact", [0.5, 480.0])
def test_nothing_is_cut_off_or_overlaps(tab: Tab, tmp_path: Path, width: int, exact: float) -> None:
    path = tmp_path / "recall.html"
    path.write_text(report.page(result([0.09, 0.11, 0.2, 0.35, 0.7, 1.4, 2.9, 6.0], exact)), encoding="utf-8")
    tab.show(path, width, "light")
    assert tab.evaluate(CUT_OFF) == []
    assert tab.evaluate(OVERLAPS) == []
    assert tab.evaluate("document.querySelectorAll('svg circle').length") == 8
