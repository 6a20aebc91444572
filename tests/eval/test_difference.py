"""`--compare`: which differences are within noise."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qembed.cli import group
from qembed.eval import difference
from tests.eval.report.conftest import full


def compare(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], *more: str) -> Result:
    for name, result in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return CliRunner().invoke(group, ["eval", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *more])


def difference_named(comparison: dict[str, Any], name: str) -> dict[str, Any]:
    (match,) = [difference for difference in comparison["differences"] if difference["name"] == name]
    return dict(match)


def test_noise_by_hand() -> None:
    assert difference.noise((0.90, 0.96), (0.91, 0.99)) == pytest.approx((0.03**2 + 0.04**2) ** 0.5)
    assert difference.noise((0.9, 1.0), None) is None


def test_differences_are_sorted_by_their_noise(tmp_path: Path) -> None:
    first = full()
    second = copy.deepcopy(first)
    overall = second["results"]["overall"]
    half = (overall["interval"][1] - overall["interval"][0]) / 2
    first["results"]["overall"] |= {"mean": 0.95, "interval": [0.95 - half, 0.95 + half]}
    overall |= {"mean": 0.95 + 1.4 * half, "interval": [0.95 + 0.4 * half, 0.95 + 2.4 * half], "p1": 0.5}
    second["results"]["by_kind"]["code"]["mean"] -= 0.5
    second["tasks"][0]["metrics"][0] |= {"candidate": 0.66, "difference": -0.05, "interval": [-0.06, -0.04]}
    report = json.loads(compare(tmp_path, first, second, "--json").stdout)
    # The noise is √2 times half an interval, and 1.4 is less than √2.
    assert difference_named(report, "mean cosine, all texts")["within_noise"] is True
    assert difference_named(report, "mean cosine, kind code")["within_noise"] is False
    assert difference_named(report, "p1 cosine, all texts")["within_noise"] is None
    (task,) = [item for item in report["differences"] if item["name"].endswith("nDCG@10, INT4 − baseline")]
    # −0.01 ± 0.02 and −0.05 ± 0.01 differ by 0.04; their noise is 0.0224.
    assert task["difference"] == pytest.approx(-0.04)
    assert task["noise"] == pytest.approx((0.02**2 + 0.01**2) ** 0.5)
    assert task["within_noise"] is False
    output = compare(tmp_path, first, second).stdout
    assert (
        output.index("More than noise: 2") < output.index("Without an interval: 1") < output.index("Within noise: 2")
    )  # all, at full dimension
    assert report["notes"] == []


def test_other_differences_between_the_runs_are_reported(tmp_path: Path) -> None:
    first, second = full(), full(count=30)
    second["data"] |= {"sha256": "cd" * 32, "file": "others.jsonl"}
    second["candidate"] |= {"dtype": "float32"}
    second["versions"] |= {"torch": "9.9"}
    second["tasks"] = []
    result = compare(tmp_path, first, second)
    assert result.exit_code == 0
    for words in (
        "not the same texts: texts.jsonl and others.jsonl",
        "computed in bfloat16",
        "torch",
        "9.9",
        "only in one of them",
    ):
        assert words in result.stdout


def test_a_result_against_itself_has_no_differences(tmp_path: Path) -> None:
    report = json.loads(compare(tmp_path, full(), full(), "--json").stdout)
    assert {item["difference"] for item in report["differences"]} == {0}
    assert len(report["differences"]) > 30


def test_an_ascii_terminal_shows_the_comparison(tmp_path: Path) -> None:
    for name, drop in (("a", 0.0), ("b", 0.1)):
        result = full()
        result["tasks"][0]["data"]["name"] = "名前"
        result["tasks"][0]["metrics"][0]["difference"] -= drop
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    command = [sys.executable, "-c", "from qembed.cli import main; main()", "eval", "--compare", "a.json", "b.json"]
    run = {"cwd": tmp_path, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}, "check": True, "capture_output": True}
    assert b"More than noise: 1" in subprocess.run(command, **run).stdout  # type: ignore[call-overload]
    names = [item["name"] for item in json.loads(subprocess.run([*command, "--json"], **run).stdout)["differences"]]  # type: ignore[call-overload]
    assert any("名前" in name for name in names)


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report.pop("data"),
        lambda report: report["results"].pop("overall"),
        lambda report: report.update(candidate=None),
        lambda report: report.update(tasks="x"),
        lambda report: report["results"].update(by_kind=[1]),
    ],
)
def test_a_damaged_result_is_one_line(tmp_path: Path, damage: Any) -> None:
    broken = full()
    damage(broken)
    for pair in ((full(), broken), (broken, full())):
        result = compare(tmp_path, *pair)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert f"{'b' if pair[1] is broken else 'a'}.json: not a whole result of `qembed eval`" in line


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    for arguments, words in (
        (("none.json", "none.json"), "none.json: cannot be read"),
        ((str(tmp_path / "a.json"), str(tmp_path / "a.json")), "not a result of this version"),
        (("none.json", "none.json", "--task", "sts"), "--compare measures nothing; leave --task out"),
    ):
        result = CliRunner().invoke(group, ["eval", "--compare", *arguments])
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert words in line
