"""The report: its JSON, its verdict, its tables."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qembed.eval import result
from qembed.eval.report import terminal
from qembed.eval.thresholds import Thresholds, verdict
from qembed.text.texts import Text
from tests.eval.test_page import full

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


def full_report(results: dict[str, Any]) -> dict[str, Any]:
    side = {"engine": "transformers", "model": "m", "weights": "awq-int4", "device": "cpu", "dtype": "float32", "url": None}
    return {
        **result.surroundings(),
        "candidate": {**side, "seconds": 1.0},
        "baseline": {
            **side,
            "engine": "server",
            "weights": None,
            "dtype": None,
            "device": None,
            "url": "http://b",
            "seconds": 1.0,
        },
        "data": {"file": "x.jsonl", "sha256": "0", "texts": 4, "limit": 10, "cut": 1, "duplicates": 0},
        "settings": {"baseline": "fp16", "min_cosine": None, "percentiles": "linear"},
        "results": results,
        "tasks": [],
        "speed": None,
        "gate": [],
        "verdict": verdict(results, [], Thresholds()),
    }


def print_report(results: dict[str, Any], width: int = 80) -> str:
    out = io.StringIO()
    terminal.print_tables(Console(file=out, width=width), full_report(results))
    return out.getvalue()


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


def test_unusable_vectors_fail_the_verdict_and_are_named() -> None:
    candidate = CANDIDATE.copy()
    candidate[0] = np.nan
    baseline = BASELINE.copy()
    baseline[3] = 0
    results = result.results(TEXTS, candidate, baseline)
    assert (results["overall"]["count"], results["overall"]["undefined"]) == (4, 2)
    assert results["overall"]["mean"] == pytest.approx(0.7)
    assert results["worst"][0] == {"id": "q1", "kind": "query", "language": "de", "cosine": None, "text": "first"}
    assert verdict(results, [], Thresholds()) == {
        "passed": False,
        "failures": ["1 candidate vectors hold NaN or infinity", "1 baseline vectors are zero"],
        "undecided": [],
    }
    json.dumps(results, allow_nan=False)
    assert "undefined" in print_report(results)


def test_only_unusable_vectors_are_a_failed_check_and_not_a_crash() -> None:
    results = result.results(TEXTS, CANDIDATE * np.nan, BASELINE)
    assert results["overall"]["mean"] is None
    failures = verdict(results, [], Thresholds(0.5))["failures"]
    assert failures[-1] == "mean cosine at dimension 2 is undefined, below --min-cosine 0.5"
    assert "–" in print_report(results)


def test_the_threshold_is_the_mean_at_full_dimension() -> None:
    results = result.results(TEXTS, CANDIDATE, BASELINE)
    mean = results["overall"]["mean"]
    assert verdict(results, [], Thresholds(mean)) == {"passed": True, "failures": [], "undecided": []}
    assert verdict(results, [], Thresholds(0.61)) == {
        "passed": False,
        "failures": ["mean cosine at dimension 2 is 0.600000, below --min-cosine 0.61"],
        "undecided": [],
    }


def test_tables_name_the_engines_and_every_group() -> None:
    output = print_report(result.results(TEXTS, CANDIDATE, BASELINE))
    assert "m, INT4 weights, through transformers, on cpu, computed in float32" in output
    assert "m, a running server, at http://b" in output
    assert "1 cut at 10 tokens" in output
    for word in ("dimension", "query", "code", "unspecified", "0.60000", "third [bold]text[/bold]"):
        assert word in output
    assert "undefined" not in output
    assert max(len(line) for line in output.splitlines()) <= 80


def test_the_report_has_versions_and_machine() -> None:
    surroundings = result.surroundings()
    assert surroundings["schema"] == 1
    assert surroundings["versions"]["numpy"] == np.__version__
    assert surroundings["machine"]["cores"] >= 1


def test_numbers_are_complete_in_a_narrow_terminal() -> None:
    output = {}
    for width in (30, 80, 200):
        with io.StringIO() as out:
            terminal.print_tables(Console(file=out, width=width), full())
            output[width] = out.getvalue()
    numbers = {width: re.findall(r"[+−]?\d\.\d{4,5}\b", text) for width, text in output.items()}
    assert numbers[30] == numbers[80] == numbers[200]
    assert max(map(len, output[80].splitlines())) < 130
