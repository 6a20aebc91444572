"""Errors with --json: an object on stdout with the exit code, the line on stderr as without it."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qembed.cli import COMMANDS, group
from qembed.command import failures
from qembed.errors import BadInput, QembedError, unwritable


def run(*arguments: str) -> Result:
    return CliRunner().invoke(group, list(arguments))


def error_of(result: Result) -> dict[str, Any]:
    """The error on stdout, which is one line."""
    assert result.stdout.count("\n") == 1, result.stdout
    error: dict[str, Any] = json.loads(result.stdout)["error"]
    assert set(error) == {"message", "exit_code", "type"}
    assert error["exit_code"] == result.exit_code
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_usage_errors_of_every_command(command: str) -> None:
    result = run(command, "--json", "--no-such-option")
    error = error_of(result)
    assert (error["type"], error["exit_code"]) == ("UsageError", 2)
    assert "--no-such-option" in error["message"]
    assert "--no-such-option" in result.stderr
    assert run(command, "--no-such-option").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "type_", "code"),
    [
        (("quantize", "--json", "--model", "./none"), "BadInput", 2),
        (("quantize", "--json", "--verify", "none"), "BadInput", 2),
        (("search", "a", "--index", "none.faiss", "--json"), "BadInput", 2),
        (("index", "none.parquet", "-o", "x.faiss", "--json"), "BadInput", 2),
        (("top", "http://127.0.0.1:9", "--once", "--json"), "QembedError", 1),
        (("nonsense", "--json"), "UsageError", 2),
        (("--no-such-option", "--json"), "UsageError", 2),
    ],
)
def test_errors_of_commands(arguments: tuple[str, ...], type_: str, code: int) -> None:
    result = run(*arguments)
    error = error_of(result)
    assert (error["type"], error["exit_code"]) == (type_, code)
    assert error["message"] in result.stderr


@pytest.mark.parametrize(
    ("raised", "type_", "code"),
    [
        (KeyboardInterrupt(), "Interrupted", 130),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "OSError", 1),
        (ModuleNotFoundError("no", name="safetensors"), "MissingExtra", 3),
        (KeyError("data"), "KeyError", 1),
        (ModuleNotFoundError("no", name="qembed.nothing"), "ModuleNotFoundError", 1),
    ],
)
def test_unexpected_errors(monkeypatch: pytest.MonkeyPatch, raised: BaseException, type_: str, code: int) -> None:
    def fail(_: str) -> None:
        raise raised

    monkeypatch.setattr("qembed.cli.importlib.import_module", fail)
    result = run("top", "--json")
    error = error_of(result)
    assert (error["type"], error["exit_code"]) == (type_, code)
    assert result.stderr == f"qembed: {error['message']}\n"
    assert run("top").stdout == ""


def test_what_a_file_quotes_at_length_is_cut_in_the_middle() -> None:
    error = failures.failure(BadInput(f"config.json: layer_types is {['x'] * 100_000}; remove it"))
    assert error is not None
    assert len(error.message) < 2100
    assert error.message.startswith("config.json: layer_types")
    assert error.message.endswith("; remove it")


def test_what_a_file_or_library_quotes_cannot_control_a_terminal() -> None:
    error = failures.failure(QembedError("vLLM did not start: Unsupported activation: \x1b[2Jevil\u202e"))
    assert error is not None
    assert error.message.isprintable()
    assert "evil" in error.message


def test_json_behind_two_dashes_is_an_argument() -> None:
    assert run("search", "--index", "none.faiss", "--", "--json").stdout == ""


def test_a_full_disk_is_exit_code_1_and_a_read_only_folder_2() -> None:
    assert unwritable("x", OSError(errno.ENOSPC, "full")).exit_code == QembedError.exit_code == 1
    assert unwritable("x", OSError(errno.EDQUOT, "quota")).exit_code == 1
    assert unwritable("x", OSError(errno.EACCES, "no")).exit_code == BadInput.exit_code == 2
