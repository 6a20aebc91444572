"""`qembed eval` never replaces its input, and an existing report only with --force."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from qembed.cli import group


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qembed.eval.evaluation.compare", lambda *_, **__: pytest.fail("measured"))


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(group, ["eval", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return result.stderr


def test_a_report_replaces_no_input_even_with_force(tmp_path: Path) -> None:
    vectors, data = tmp_path / "vectors.json", tmp_path / "data.json"
    vectors.write_text("vectors")
    data.write_text("data")
    (tmp_path / "link.html").symlink_to(vectors)
    for report in (vectors, tmp_path / "." / "vectors.json", tmp_path / "link.html", data):
        line = refused("--vectors", vectors, "--data", data, "--report", report, "--force")
        assert "is the input" in line
    keys = tmp_path / "keys.json"
    keys.write_text("a-secret-key")
    assert "is the input" in refused("--url", "http://127.0.0.1:9", "--api-key-file", keys, "--report", keys, "--force")
    assert keys.read_text() == "a-secret-key"
    assert "same file" in refused("--report", tmp_path / "a.json", "--report", tmp_path / "a.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "belongs to the input" in refused(
        "--model", tmp_path / "model", "--report", tmp_path / "model" / "config.json", "--force"
    )
    assert (vectors.read_text(), data.read_text()) == ("vectors", "data")


def test_an_existing_report_is_replaced_only_with_force(tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    report.write_text("mine")
    assert "--force to replace it" in refused("--report", report)
    assert "exists already" not in refused("--report", report, "--force", "--data", tmp_path / "none.jsonl")
    assert report.read_text() == "mine"
