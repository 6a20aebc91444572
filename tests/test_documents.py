"""README, CONTRIBUTING and the pages of docs/: links, names, flags and outputs are those of the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from qembed.cli import COMMANDS, group

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md", "deploy/ray/README.md", "bench/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SUBJECTS = {
    "quantize", "rerank", "serve", "embed", "evaluate", "search", "clients", "vector-databases", "deploy", "troubleshooting",
    "how-it-works", "benchmarks", "upstream", "cli", "security-files", "models", "is-int4-enough",
}  # fmt: skip
FOLDERS = "qembed|quantize|serve|embed|eval|search|deploy|bench|tests|docs|examples"
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = FENCE.sub("", text_of(page)).splitlines()
    titles = [line.lstrip("# ").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}


def calls(text: str) -> list[list[str]]:
    """The words of every `qembed COMMAND …` in code blocks and in backticks, without comments."""
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    code = [*lines, *re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    words = [re.split(r"\s#\s", line)[0].removeprefix("$ ").split() for line in code]
    return [call for call in words if call[:1] == ["qembed"] and len(call) > 1 and call[1] in COMMANDS]


def help_module() -> ModuleType:
    """Import docs/help.py, which is not a package."""
    spec = importlib.util.spec_from_file_location("docs_help", ROOT / "docs" / "help.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_at_most_200_lines_and_links_every_page() -> None:
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= 200
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == SUBJECTS
    for subject in SUBJECTS:
        assert f"](docs/{subject}.md)" in readme, subject


@every_page
def test_links_and_anchors_exist(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", FENCE.sub("", text_of(page))):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


@every_page
def test_files_that_a_page_names_exist(page: Path) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text_of(page)):
        assert (ROOT / path).exists(), path


@every_page
def test_make_targets_that_a_page_names_exist(page: Path) -> None:
    makefile = text_of(ROOT / "Makefile")
    text = text_of(page)
    lines = [*"\n".join(FENCE.findall(text)).splitlines(), *re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    for goal in re.findall(r"^make ([a-z][\w-]*)", "\n".join(lines), re.MULTILINE):
        assert re.search(rf"^{goal}:", makefile, re.MULTILINE), goal


@every_page
def test_flags_that_a_page_names_exist(page: Path) -> None:
    help_text = help_module().help_text
    for call in calls(text_of(page)):
        flags = {flag for word in call for flag in re.findall(r"^--[a-z][\w-]*", word)}
        assert flags <= set(re.findall(r"--[a-z][\w-]*", help_text(call[1]))), " ".join(call)


@every_page
def test_a_plan_that_a_page_shows_is_what_the_command_prints(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for command, output in re.findall(r"^\$ (qembed serve --plan .*)\n((?:.+\n)+?)```", text_of(page), re.MULTILINE):
        result = CliRunner().invoke(group, command.split()[1:])
        assert result.exit_code == 0, result.stderr
        assert [line.split() for line in result.stdout.splitlines()] == [line.split() for line in output.splitlines()]


def test_messages_on_the_troubleshooting_page_are_in_the_code() -> None:
    files = [file for folder in FOLDERS.split("|")[:6] for file in (ROOT / folder).rglob("*.py")]
    code = "\n".join(text_of(file) for file in files)
    page = text_of(ROOT / "docs" / "troubleshooting.md")
    for heading in ("quantize", "serve", "embed and eval"):
        rows = re.findall(r"^\| ([^|]+) \|", page.split(f"\n## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)
        messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
        assert messages
        for part in (part.strip() for message in messages for part in message.split("…")):
            assert part in code, part


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_reference_links_and_has_a_section_for(command: str) -> None:
    assert f"qembed-{command}" in anchors(ROOT / "docs" / "cli.md")
    pages = [page for page in (ROOT / "docs").glob("*.md") if f"](cli.md#qembed-{command})" in text_of(page)]
    assert pages, "no page of docs/ links to it"


def test_check_fails_and_names_the_page_when_a_help_text_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = help_module()
    monkeypatch.setattr(module, "PAGE", tmp_path / "cli.md")
    assert module.main(["--check"]) == 1, "there is no page yet"
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0
    written = (tmp_path / "cli.md").read_text(encoding="utf-8")
    assert written == module.page()
    for name in COMMANDS:
        assert f"\n## qembed {name}\n" in written
        assert f"Usage: qembed {name} " in written
    (tmp_path / "cli.md").write_text(written.replace("--json", "--xml"), encoding="utf-8")
    capsys.readouterr()
    assert module.main(["--check"]) == 1
    assert "docs/cli.md" in capsys.readouterr().err
