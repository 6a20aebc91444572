"""The report of `qembed index`."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qembed.errors import QembedError
from qembed.search import report
from tests.search.conftest import clustered, json_output, qembed, write


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str | None] = []
        self.names: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "style") or name.startswith("on")]


def test_the_report_plots_recall_against_time_and_is_self_contained(tmp_path: Path) -> None:
    write(tmp_path / "v.parquet", clustered(2000))
    output = tmp_path / "<b>i.faiss"
    summary = json_output(
        *("index", tmp_path / "v.parquet", "-o", output, "--kind", "hnsw"),
        *("--report", tmp_path / "r.html", "--report", tmp_path / "r.json"),
    )
    assert json.loads((tmp_path / "r.json").read_text()) == summary
    page = (tmp_path / "r.html").read_text()
    tags = Tags(page)
    assert tags.links == ["data:,"]
    assert not {"script", "img", "b", "iframe"} & set(tags.names)
    assert tags.names.count("svg") == 1
    assert tags.names.count("circle") == len(summary["recall"]["points"]) > 1
    assert f"ef_search {summary['width']}, the smallest that finds 95%" in page
    qembed("index", tmp_path / "v.parquet", "-o", output, "--force", "--report", tmp_path / "r.html")
    assert "its answers are exact" in (tmp_path / "r.html").read_text()


def test_if_the_report_fails_the_result_is_still_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _: object) -> None:
        raise QembedError(f"{path}: the disk is full")

    monkeypatch.setattr(report, "write", fail)
    command = (
        "index",
        write(tmp_path / "v.parquet", clustered(200)),
        "-o",
        tmp_path / "i.faiss",
        "--report",
        tmp_path / "r.json",
    )
    code, out, err = qembed(*command, "--json")
    assert (code, out.count("\n")) == (1, 1)
    output = json.loads(out)
    assert (output["rows"], output["error"]["exit_code"]) == (200, 1)
    assert "r.json: the disk is full" in err
    code, out, _ = qembed(*command, "--force")
    assert (code, "200 vectors" in out) == (1, True)
