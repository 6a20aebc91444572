from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from qembed.cli import COMMANDS, group

HEAVY = ("torch", "transformers", "vllm", "numpy", "openai", "rich", "huggingface_hub")


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from qembed.cli import group
try:
    group.main({[*arguments, "--help"]!r}, prog_name="qembed")
except SystemExit as exit:
    assert exit.code == 0
print("LOADED", [name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: qembed" in result.stdout
    assert "LOADED []" in result.stdout


def test_every_option_has_a_help_text() -> None:
    for name in COMMANDS:
        command = group.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_bad_input_is_one_line_and_exit_code_2_and_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(group, ["quantize", "--model", "./no-such-folder"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("qembed: ./no-such-folder: no such folder")
    traced = CliRunner().invoke(group, ["--debug", "quantize", "--model", "./no-such-folder"])
    assert traced.exception is not None
    assert "no such folder" in str(traced.exception)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "qembed: interrupted"),
        (PermissionError(13, "Permission denied", "/tmp"), 1, "qembed: /tmp: Permission denied"),
        (KeyError("data"), 1, "qembed: unexpected: KeyError: 'data' (a fault of qembed's; `qembed --debug …` shows where)"),
    ],
)
def test_unexpected_errors_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, line: str
) -> None:
    def fail(_: str) -> None:
        raise raised

    monkeypatch.setattr("qembed.cli.importlib.import_module", fail)
    result = CliRunner().invoke(group, ["top"])
    assert (result.exit_code, result.stderr) == (code, line + "\n")
    if code == 1:
        assert CliRunner().invoke(group, ["--debug", "top"]).exception is raised


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(group, ["nonsense"]).exit_code == 2


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_shows_examples_one_a_line_and_within_80_columns(arguments: list[str]) -> None:
    result = CliRunner().invoke(group, [*arguments, "--help"], terminal_width=80, prog_name="qembed")
    assert result.exit_code == 0
    assert "\\b" not in result.output
    assert "\b" not in result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    for line in lines:
        assert line.count("  qembed ") <= 1, line


@pytest.mark.parametrize(("name", "hint"), [("quantise", "'quantize'"), ("serv", "'serve'"), ("zzz", "quantize, serve")])
def test_a_misspelt_command_gets_a_suggestion(name: str, hint: str) -> None:
    result = CliRunner().invoke(group, [name])
    assert result.exit_code == 2
    assert hint in result.stderr.splitlines()[-1]


def test_python_m_qembed_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "qembed", "--version"], capture_output=True, text=True, check=True)
    assert "version" in result.stdout


PARAMETERS = [(name, parameter) for name in COMMANDS for parameter in group.get_command(None, name).params]  # type: ignore
OPTIONS = [
    pytest.param(name, option, id=f"{name} {option.opts[0]}") for name, option in PARAMETERS if isinstance(option, click.Option)
]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_an_option_with_a_value_shows_its_default_or_the_effect_without(command: str, option: click.Option) -> None:
    """A default that is a value is shown by click or in the help."""
    if option.is_flag or option.default in (None, ()) or type(option.default).__name__ == "Sentinel":
        return
    assert option.show_default or "[default: " in (option.help or ""), command


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_stays_within_100_columns(arguments: list[str]) -> None:
    result = CliRunner().invoke(group, [*arguments, "--help"], terminal_width=100, prog_name="qembed")
    assert max(map(len, result.output.splitlines())) <= 100


def test_the_same_thing_has_the_same_name_in_all_commands() -> None:
    names = {command: {name for _, option in PARAMETERS if _ == command for name in option.opts} for command in COMMANDS}
    assert all("--json" in options for options in names.values())
    for command in ("quantize", "index", "embed"):
        assert {"-o", "--output", "--force"} <= names[command], command
    for command in ("quantize", "embed", "search"):
        assert "--text-column" in names[command], command


def test_an_option_of_several_commands_is_described_alike() -> None:
    by_name: dict[str, list[tuple[str, click.Option]]] = {}
    for command, option in PARAMETERS:
        if isinstance(option, click.Option):
            by_name.setdefault(option.opts[0], []).append((command, option))
    assert len(by_name["--json"]) >= 7
    for command, option in by_name["--json"]:
        assert str(option.help).startswith("Print one JSON object"), command
        assert str(option.help).endswith(", on one line and alone on standard output; for an error too."), command
    texts = {option.help for command, option in by_name["--api-key-file"] if command != "serve"}
    assert len(texts) == 1
    assert {option.metavar for _, option in by_name["--api-key-file"]} == {"FILE"}


@pytest.mark.parametrize(("encoding", "written"), [("ascii", "utf-8"), ("latin-1", "latin-1")])
def test_json_keeps_characters_that_the_terminal_has_not(encoding: str, written: str) -> None:
    name = "/missing/é→😀"
    arguments = ["serve", "--int4", "--model", name, "--json", "--log-format", "json"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-m", "qembed", *arguments], env=environment, capture_output=True, check=False)
    assert result.returncode == 2
    assert name in json.loads(result.stdout.decode(written))["error"]["message"]
    assert name in json.loads(result.stderr.decode(written))["message"]


def test_a_closed_standard_input_is_an_empty_one() -> None:
    arguments = [sys.executable, "-m", "qembed", "search", "-", "--index", "none.faiss"]
    result = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "nothing to search for" in result.stderr
