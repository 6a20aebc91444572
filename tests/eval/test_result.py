"""Results: their numbers, and files that hold none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qembed.errors import BadInput
from qembed.eval import result
from qembed.text.texts import Text

TEXTS = [
    Text("q1", "first", "query", "de"),
    Text("d1", "second", "document", "en"),
    Text("d2", "third [bold]text[/bold]", "document", None),
    Text("c1", "f()", "code", "en"),
]


def vectors(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


BASELINE = vectors([1, 0], [1, 0], [1, 0], [1, 0])


CANDIDATE = vectors([1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1])


def test_results_by_hand() -> None:
    results = result.results(TEXTS, CANDIDATE, BASELINE)
    assert results["dimension"] == 2
    assert results["overall"]["mean"] == pytest.approx((1 + 0.8 + 0.6 + 0) / 4)
    assert results["overall"]["median"] == pytest.approx(0.7)
    assert results["overall"]["minimum"] == pytest.approx(0)
    assert list(results["by_dimension"]) == ["2"]
    assert results["by_dimension"]["2"] == results["overall"]
    assert {name: part["mean"] for name, part in results["by_kind"].items()} == pytest.approx(
        {"query": 1, "document": 0.7, "code": 0}
    )
    assert {name: part["mean"] for name, part in results["by_language"].items()} == pytest.approx(
        {"de": 1, "en": 0.4, "unspecified": 0.6}
    )
    assert [row["id"] for row in results["worst"]] == ["c1", "d2", "d1", "q1"]
    assert results["worst"][1]["cosine"] == pytest.approx(0.6)
    assert results["vectors"] == {
        "candidate": {"not_finite": 0, "zero": 0, "duplicate": 0},
        "baseline": {"not_finite": 0, "zero": 0, "duplicate": 3},
    }


def test_the_report_has_versions_and_machine() -> None:
    surroundings = result.surroundings()
    assert surroundings["schema"] == 1
    assert surroundings["versions"]["numpy"] == np.__version__
    assert surroundings["machine"]["cores"] >= 1


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    for content, words in (
        ("{}", "not a result"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"schema": 9}', "no schema 1"),
    ):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(BadInput, match=words):
            result.read(tmp_path / "r.json")
