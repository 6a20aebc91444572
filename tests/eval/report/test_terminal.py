"""The tables on the terminal, and the verdict on unusable vectors."""

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
from tests.eval.report.conftest import full
from tests.eval.test_result import BASELINE, CANDIDATE, TEXTS


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
        "failures": ["1 candidate vector with NaN or infinity", "1 baseline vector of zeros alone"],
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


def test_tables_name_the_engines_and_every_group() -> None:
    output = print_report(result.results(TEXTS, CANDIDATE, BASELINE))
    assert "m, INT4 weights, through transformers, on cpu, computed in float32" in output
    assert "m, a running server, at http://b" in output
    assert "1 cut at 10 tokens" in output
    for word in ("dimension", "query", "code", "unspecified", "0.60000", "third [bold]text[/bold]"):
        assert word in output
    assert "undefined" not in output
    assert max(len(line) for line in output.splitlines()) <= 80


def test_numbers_are_complete_in_a_narrow_terminal() -> None:
    output = {}
    for width in (30, 80, 200):
        with io.StringIO() as out:
            terminal.print_tables(Console(file=out, width=width), full())
            output[width] = out.getvalue()
    numbers = {width: re.findall(r"[+−]?\d\.\d{4,5}\b", text) for width, text in output.items()}
    assert numbers[30] == numbers[80] == numbers[200]
    assert max(map(len, output[80].splitlines())) < 130
