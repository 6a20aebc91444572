"""A minute of `make fuzz`, always with the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, fuzz

SECONDS = 60 / len(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs_give_results_or_one_line(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    assert fuzz(target, target.prepare(tmp_path / "fuzz"), SECONDS, seed=0) > len(target.seeds)
