"""What the checks of deploy/ have in common: tools that a machine may lack, and the flags of `qembed`."""

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
    """Where the program `name` is; the test is skipped where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed" + (f" (Debian's package {debian})" if debian else ""))
    return found


def python() -> str:
    """The Python that the packages of deploy/requirements/deploy.txt are installed for."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON.relative_to(ROOT)} is missing: make build/deploy/installed")
    return str(PYTHON)


def run(*command: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command that may fail; its output as text."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False, **more)


def documents(text: str) -> list[dict[str, Any]]:
    """The YAML documents of `text`."""
    return [one for one in yaml.safe_load_all(text) if one is not None]


@cache
def help_of(*command: str) -> str:
    """What `qembed COMMAND --help` prints."""
    done = run(QEMBED, *command, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def unknown_flags(arguments: list[str]) -> list[str]:
    """The flags of a `qembed` command line that its `--help` does not have."""
    known = set(help_of(arguments[0]).replace(",", " ").replace("/", " ").replace("[", " ").split())
    return [flag for one in arguments[1:] if one.startswith("--") and (flag := one.partition("=")[0]) not in known]


def replaced(arguments: list[str], **values: str) -> list[str]:
    """The arguments with other values for some flags: `model="sample"` is for `--model=…` and `--model …`."""
    found = list(arguments)
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        for place, one in enumerate(found):
            if one == flag:
                found[place + 1] = value
            elif one.startswith(f"{flag}="):
                found[place] = f"{flag}={value}"
    return found


def plans(arguments: list[str], int4: Path, keys: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`qembed serve` with these arguments, for the checkpoint and the keys given, as far as the plan: all values are read."""
    return run(QEMBED, *replaced(arguments, model=str(int4), api_key_file=str(keys)), "--plan", "--json", *more)


def value_of(arguments: list[str], flag: str) -> str:
    """What follows `flag`."""
    for place, one in enumerate(arguments):
        if one.startswith(f"{flag}="):
            return one.partition("=")[2]
        if one == flag:
            return arguments[place + 1]
    raise AssertionError(f"{flag} is not in {arguments}")
