"""JSON without NaN and infinity, which every parser reads."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from qembed.embed.formats import Csv, Jsonl, Npy
from qembed.embed.outputs import Output, VectorBlock, VectorLayout, lines
from qembed.text import strict_json

NUMBERS = [1.5, float("nan"), float("inf"), -float("inf")]


def refuse(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_non_finite_numbers_become_null_at_any_depth() -> None:
    value = {"a": NUMBERS, "b": {"c": (float("nan"), "x")}, "d": datetime.date(2026, 1, 2), "e": "ü"}
    text = strict_json.dumps(value)
    assert json.loads(text, parse_constant=refuse) == {
        "a": [1.5, None, None, None],
        "b": {"c": [None, "x"]},
        "d": "2026-01-02",
        "e": "ü",
    }
    assert "ü" in text


@pytest.mark.parametrize("kind", [Jsonl, Npy, Csv])
def test_kept_columns_are_json_in_every_output(kind: type[Output], tmp_path: Path) -> None:
    import numpy as np

    vectors = np.ones((4, 2), np.float32)
    output = kind(tmp_path, VectorLayout("float32", "float32", 2, ("price", "tags"), {}), {})
    output.write(VectorBlock(vectors, ["a", "b", "c", "d"], {"price": NUMBERS, "tags": [NUMBERS] * 4}))
    output.sizes()
    text = (tmp_path / ("ids.jsonl" if kind is Npy else "vectors")).read_text()
    if kind is Csv:
        assert "NaN" not in text
        return
    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [row["price"] for row in rows] == [1.5, None, None, None]
    assert rows[0]["tags"] == [1.5, None, None, None]


def test_rejects_are_json() -> None:
    assert json.loads(lines([{"value": float("nan")}]), parse_constant=refuse) == {"value": None}
