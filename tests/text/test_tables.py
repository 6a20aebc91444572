"""CSV and TSV as every command reads them; tests/cases/02-tsv-quotes is a dialogue whose lines begin and end with quotes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qembed.embed.inputs import find
from qembed.embed.readers import Reading
from qembed.eval.readers import files
from qembed.quantize import calibration_texts
from qembed.text import tables

DIALOG = Path(__file__).parents[1] / "cases" / "02-tsv-quotes" / "dialog.tsv"
TEXTS = ['"I came home late.', 'Nobody was awake."', "The lamp was still on."]


def by_embed(path: Path) -> list[str]:
    return [row.text for row in Reading(find(str(path), None, "lines", set())).rows()]


def by_eval(path: Path) -> list[str]:
    return [row["text"] for _, row in files.rows(path)]


def by_quantize(path: Path) -> list[str]:
    return [text.text for text in calibration_texts._rows(path, "text")]


@pytest.mark.parametrize("read", [by_embed, by_eval, by_quantize])
def test_tsv_quotes_are_literal(read: Callable[[Path], list[str]]) -> None:
    assert read(DIALOG) == TEXTS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cells_by_format(end: str) -> None:
    def rows(suffix: str, *lines: str) -> list[list[str]]:
        return list(tables.reader(iter([line + end for line in lines]), suffix))

    assert rows(".csv", 'a,"b, ""c"""', '"two', 'lines",d') == [["a", 'b, "c"'], [f"two{end}lines", "d"]]
    assert rows(".tsv", 'a\t"b, ""c"""', '"two', 'lines"\td') == [["a", '"b, ""c"""'], ['"two'], ['lines"', "d"]]


def test_a_cell_may_be_longer_than_the_csv_module_takes_by_itself() -> None:
    long = "x" * 200_000
    assert list(tables.reader(iter([f"{long},y\n"]), ".csv")) == [[long, "y"]]
