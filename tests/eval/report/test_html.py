"""The page, the Markdown and the model card: the same numbers, no external resources, and escaped texts."""

from __future__ import annotations

import io
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from qembed.checkpoint import model_card as cards
from qembed.cli import group
from qembed.errors import QembedError
from qembed.eval import result
from qembed.eval.report import card, files, html, markdown, terminal
from qembed.eval.thresholds import Thresholds, verdict
from qembed.report.files import KINDS
from qembed.text.texts import Text
from tests.eval.report.conftest import full


class Tags(HTMLParser):
    """The tags of a page, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.names: set[str] = set()
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_self_contained_and_has_no_scripts() -> None:
    page = html.page(full())
    tags = Tags(page)
    assert tags.open == []
    assert not tags.names & {"script", "iframe", "img", "object", "embed", "form"}
    links = [value for name, value in tags.attributes if name in ("href", "src", "action", "style") or name.startswith("on")]
    assert links == ["data:,"]
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<svg") >= 6
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_texts_and_names_are_escaped() -> None:
    evaluation = full()
    page = html.page(evaluation)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    lines = markdown.document(evaluation).splitlines()
    assert not any("<script>" in line or re.search(r"(?<!\\)\]\(", line) for line in lines)
    rows = [line for line in lines if line.startswith("| t0")]
    assert len(rows) == 10
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


@pytest.mark.parametrize(
    ("thresholds", "kind", "words"),
    [
        (Thresholds(), "open", "No thresholds were set"),
        (Thresholds(0.5, 0.4, 0.5), "met", "Yes: all thresholds are met"),
        (Thresholds(0.9999, 0.9999, 0.0), "missed", "No: 2 checks failed"),
        (Thresholds(max_task_drop=0.0), "open", "Too few texts to tell"),
        (Thresholds(0.9999), "missed", "No: a check failed"),
    ],
)
def test_the_verdict_comes_first(thresholds: Thresholds, kind: str, words: str) -> None:
    evaluation = full(thresholds)
    for text in (html.page(evaluation), markdown.document(evaluation)):
        assert words in text
        assert text.index(words) < text.index("osine by dimension" if text.startswith("#") else "By dimension")
    assert f'class="verdict {kind}"' in html.page(evaluation)
    for line in (*evaluation["verdict"]["failures"], *evaluation["verdict"]["undecided"]):
        assert escape(" ".join(line.split()[:3])) in html.page(evaluation)


def test_all_reports_show_the_verdict_on_a_task() -> None:
    evaluation = full(Thresholds(max_task_drop=0.005))
    (task,) = evaluation["gate"]
    assert task["verdict"] == "too few texts to tell"
    out = io.StringIO()
    terminal.print_tables(Console(file=out, width=200), evaluation)
    for text in (html.page(evaluation), markdown.document(evaluation), out.getvalue()):
        for words in ("too few texts to tell", "1.41%", "−1.41%…4.23%", f"{task['texts_needed']:,}"):
            assert words in text


def test_all_reports_have_the_same_numbers() -> None:
    evaluation = full()
    page, text = html.page(evaluation), markdown.document(evaluation)
    overall = evaluation["results"]["overall"]
    numbers = [f"{overall[key]:.5f}" for key in ("mean", "median", "p5", "p1", "minimum")]
    numbers += [
        f"{evaluation['results']['neighbours']['mixed']['spearman']:.5f}",
        "0.7050",
        "−0.0300…+0.0100",
        "2,000 MB",
        "de → zh",
    ]
    numbers += [f"{row['cosine']:.5f}" for row in evaluation["results"]["worst"]]
    for number in numbers:
        assert number in page, number
        assert number in text, number
    for version in filter(None, evaluation["versions"].values()):
        assert version in page
        assert version in text


def test_a_result_without_defined_cosines_is_still_a_page() -> None:
    evaluation = full()
    texts = [Text("a", "a"), Text("b", "b")]
    evaluation["results"] = result.results(texts, np.zeros((2, 4), np.float32), np.ones((2, 4), np.float32))
    evaluation |= {"tasks": [], "speed": None, "verdict": verdict(evaluation["results"], [], Thresholds())}
    page = html.page(evaluation)
    assert "2 candidate vectors of zeros alone" in page
    assert "memory in use is measured with --task speed" in page
    assert "–" in markdown.document(evaluation)


def test_a_report_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = full()
    for kind in KINDS:
        files.write(tmp_path / f"r{kind}", evaluation)
    assert result.read(tmp_path / "r.json") == json.loads(json.dumps(evaluation))
    before = (tmp_path / "r.html").read_text()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(Exception, match=r"r\.html: cannot be written: No space left on device"):
        files.write(tmp_path / "r.html", {**evaluation, "created": "later"})
    assert (tmp_path / "r.html").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "r.md"]


def test_only_the_section_of_eval_in_a_model_card_changes(tmp_path: Path) -> None:
    text = f"# A card\n\nBefore.\n\n{cards.section('old numbers')}\n\n## After\n\nStays.\n"
    (tmp_path / "README.md").write_text(text)
    evaluation = full()
    for _ in range(2):
        card.write(tmp_path, evaluation)
    changed = (tmp_path / "README.md").read_text()
    assert "old numbers" not in changed
    assert f"mean {evaluation['results']['overall']['mean']:.4f} (±" in changed
    assert "| 128 | 60 |" in changed
    assert "nDCG@10" in changed
    assert "de → zh" not in changed
    assert changed.startswith("# A card\n\nBefore.\n\n<!-- qembed eval: begin -->\n## How near")
    assert changed.endswith("<!-- qembed eval: end -->\n\n## After\n\nStays.\n")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Somebody's\n")
    card.write(tmp_path, evaluation)
    assert (
        (tmp_path / "README.md").read_text().startswith("---\nlicense: mit\n---\n# Somebody's\n\n<!-- qembed eval: begin -->")
    )


def evaluate(int4: Path, tmp_path: Path, *more: object) -> Result:
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\nfour\n")
    options = ("--model", int4, "--engine", "transformers", "--data", tmp_path / "few.txt", *more)
    return CliRunner().invoke(group, ["eval", *map(str, options)])


def test_reports_and_card_from_the_command(int4: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy-AWQ-INT4"
    shutil.copytree(int4, copy)
    (tmp_path / "out").mkdir()
    reports = [tmp_path / "out" / f"r{kind}" for kind in KINDS]
    run = evaluate(copy, tmp_path, *(part for path in reports for part in ("--report", path)), "--json")
    assert run.exit_code == 0, run.stderr
    assert json.loads(reports[1].read_text()) == json.loads(run.stdout)
    assert not (copy / "README.md").exists()
    for path in reports:
        assert f"report written to {path}" in run.stderr
    assert "README.md" not in evaluate(copy, tmp_path).output
    run = evaluate(copy, tmp_path, "--card")
    assert f"numbers written into {copy / 'README.md'}" in run.stderr
    mean = json.loads(reports[1].read_text())["results"]["overall"]["mean"]
    assert f"mean {mean:.4f}" in (copy / "README.md").read_text()


def test_if_a_report_fails_the_result_is_still_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _: str) -> None:
        if path.suffix != ".md":
            raise QembedError(f"{path}: the disk is full")
        path.touch()

    monkeypatch.setattr(files, "replace", fail)
    np.save(tmp_path / "v.npy", np.eye(4))
    command = ["eval", *("--vectors", f"{tmp_path}/v.npy", "--baseline-vectors", f"{tmp_path}/v.npy")]
    reports = [part for kind in ("html", "md", "json") for part in ("--report", f"{tmp_path}/r.{kind}")]
    run = CliRunner().invoke(group, [*command, *reports, "--json"])
    assert (run.exit_code, run.stdout.count("\n")) == (2, 1)
    output = json.loads(run.stdout)
    assert output["results"]["overall"]["mean"] == 1
    assert output["error"]["exit_code"] == 2
    assert [name in output["error"]["message"] for name in ("r.html", "r.md", "r.json")] == [True, False, True]
    assert "report written to" in run.stderr
    (tmp_path / "r.md").unlink()
    run = CliRunner().invoke(group, [*command, *reports])
    assert run.exit_code == 2
    assert "Cosine by dimension" in run.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [("r.pdf", "name it .html, .json or .md"), ("none/r.html", "there is no folder"), ("folder.md", "a folder")],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_run(int4: Path, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.md").mkdir()
    run = evaluate(int4, tmp_path, "--report", tmp_path / name)
    assert run.exit_code == 2
    (line,) = run.stderr.splitlines()
    assert words in line


def test_a_report_never_replaces_an_input(int4: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy-AWQ-INT4"
    shutil.copytree(int4, copy)
    (tmp_path / "squad.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "squad.json")
    for report in (copy / "config.json", tmp_path / "squad.json", tmp_path / "link.json"):
        run = evaluate(copy, tmp_path, "--retrieval", tmp_path / "squad.json", "--report", report)
        assert run.exit_code == 2
        assert f"--report {report}" in run.stderr
        assert "would be lost" in run.stderr
    assert json.loads((copy / "config.json").read_text())["model_type"] == "qwen3"


def test_card_without_a_checkpoint_is_refused_before_the_run(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.eye(4))
    options = ("--vectors", tmp_path / "v.npy", "--baseline-vectors", tmp_path / "v.npy", "--card")
    run = CliRunner().invoke(group, ["eval", *map(str, options)])
    assert run.exit_code == 2
    assert "--card: name the checkpoint whose card it is with --model" in run.stderr
