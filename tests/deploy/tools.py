"""Helpers for the tests of deploy/: tools that a machine may lack, and the flags of `qembed`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PYTHON = ROOT / "build" / "deploy" / "bin" / "python"
QEMBED = shutil.which("qembed", path=str(Path(sys.executable).parent)) or "qembed"


def tool(name: str, debian: str | None = None) -> str:
    """The path of the program `name`; skips the test if it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed" + (f" (Debian's package {debian})" if debian else ""))
    return path


def python() -> str:
    """The Python of build/deploy, which has the packages of deploy/requirements/deploy.txt."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON.relative_to(ROOT)} is missing: make build/deploy/installed")
    return str(PYTHON)


def run(*command: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail, with its output as text."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False, **more)


def documents(text: str) -> list[dict[str, Any]]:
    """The YAML documents of `text`."""
    return [document for document in yaml.safe_load_all(text) if document is not None]


@cache
def help_of(*command: str) -> str:
    """The output of `qembed COMMAND --help`."""
    result = run(QEMBED, *command, "--help")
    assert result.returncode == 0, result.stderr
    return result.stdout


def unknown_flags(arguments: list[str]) -> list[str]:
    """The flags of a `qembed` command line that its `--help` does not have."""
    known = set(help_of(arguments[0]).replace(",", " ").replace("/", " ").replace("[", " ").split())
    return [
        flag for argument in arguments[1:] if argument.startswith("--") and (flag := argument.partition("=")[0]) not in known
    ]


def replaced(arguments: list[str], **values: str) -> list[str]:
    """`arguments` with other values for some flags: `model="sample"` changes `--model=…` and `--model …`."""
    changed = list(arguments)
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        for position, argument in enumerate(changed):
            if argument == flag:
                changed[position + 1] = value
            elif argument.startswith(f"{flag}="):
                changed[position] = f"{flag}={value}"
    return changed


def plans(arguments: list[str], int4: Path, keys: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run `qembed serve --plan` with these arguments, for the checkpoint `int4` and the file `keys`: it reads all values."""
    return run(QEMBED, *replaced(arguments, model=str(int4), api_key_file=str(keys)), "--plan", "--json", *more)


def value_of(arguments: list[str], flag: str) -> str:
    """The value of `flag`."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag:
            return arguments[position + 1]
    raise AssertionError(f"{flag} is not in {arguments}")
