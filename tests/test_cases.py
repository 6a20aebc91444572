"""Inputs that a command once got wrong, one folder each in tests/cases, and what is right.

To add a case: a folder `tests/cases/NN-name` with the smallest input that shows it, and here a function with the decorator
`@case("NN-name")`. It gets the folder and pytest's request (`request.getfixturevalue("embed")`); `marks` are those of a test.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from tests.embed.conftest import Embed, embed, expected  # noqa: F401 - the fixture `embed`

CASES = Path(__file__).parent / "cases"
Check = Callable[[Path, pytest.FixtureRequest], None]
CHECKS: dict[str, tuple[Check, tuple[pytest.MarkDecorator, ...]]] = {}


def case(name: str, *marks: pytest.MarkDecorator) -> Callable[[Check], Check]:
    """Register the check of a folder."""

    def register(check: Check) -> Check:
        CHECKS[name] = (check, marks)
        return check

    return register


def tools(request: pytest.FixtureRequest) -> tuple[Embed, Path]:
    """`qembed embed` with the stand-in for an engine, and an empty folder."""
    return request.getfixturevalue("embed"), request.getfixturevalue("tmp_path")


def strict(line: str) -> Any:
    """JSON as other parsers read it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def strict_lines(path: Path) -> list[Any]:
    return [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]


@case("02-tsv-quotes")
def quotes_in_tsv_are_literal(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    assert run(folder / "dialog.tsv", "-o", out / "out.jsonl", "--keep", "text").exit_code == 0
    texts = ['"I came home late.', 'Nobody was awake."', "The lamp was still on."]
    assert [row["text"] for row in strict_lines(out / "out.jsonl")] == texts


@case("11-nan-json")
def json_holds_no_nan(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    for name, told in (("out.jsonl", "out.jsonl"), ("out.npy", "out.ids.jsonl")):
        done = run(folder / "nanprice.parquet", "-o", out / name, "--keep", "price", "--json")
        assert done.exit_code == 0, done.output
        assert strict(done.stdout)["vectors"] == 3
        assert [row["price"] for row in strict_lines(out / told)] == [1.5, None, 2.0]


@case("12-nul-kept-text")
def kept_text_holds_no_nul(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    texts = ["Invoice 42 of the printer shop", "soft\u00adhyphen and zero\u200bwidth", "plain"]
    for suffix in ("parquet", "jsonl", "csv", "npy"):
        assert run(folder / "nul.jsonl", "-o", out / f"out.{suffix}", "--keep", "text").exit_code == 0
    assert pyarrow.parquet.read_table(out / "out.parquet")["text"].to_pylist() == texts
    assert [row["text"] for row in strict_lines(out / "out.jsonl")] == texts
    assert [row["text"] for row in strict_lines(out / "out.ids.jsonl")] == texts
    with (out / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts
    np.testing.assert_array_equal(np.load(out / "out.npy")[0], expected(texts[0]))


@case("15-duplicate-header")
def two_columns_of_one_name_are_refused(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    refused = run(folder / "dupheader.csv", "-o", out / "out.npy")
    assert refused.exit_code == 2
    assert "dupheader.csv: 2 columns are named 'text' (2, 3)" in refused.stderr
    assert "--text-column" in refused.stderr
    for column, text in (("2", "first"), ("3", "second")):
        assert run(folder / "dupheader.csv", "-o", out / "out.npy", "--text-column", column, "--force").exit_code == 0
        np.testing.assert_array_equal(np.load(out / "out.npy"), [expected(text)])


@case("17-parquet-bytes-id")
def binary_ids_become_hexadecimal(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    assert run(folder / "binid.parquet", "-o", out / "out.parquet").exit_code == 0
    assert pyarrow.parquet.read_table(out / "out.parquet")["id"].to_pylist() == ["0102", "fffe"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, (_, marks) in sorted(CHECKS.items())])
def test_case(name: str, request: pytest.FixtureRequest) -> None:
    CHECKS[name][0](CASES / name, request)


def test_every_case_has_a_check() -> None:
    assert sorted(CHECKS) == sorted(path.name for path in CASES.iterdir() if path.is_dir())
