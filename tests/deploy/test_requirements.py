"""The pinned lists are complete, made as the Makefile says, and satisfy pyproject.toml. lock.py runs offline here."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import packaging.requirements
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.tools import DEPLOY, ROOT

LISTS = DEPLOY / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK_ARGUMENTS = dict(re.findall(r"\$\(call locked,([\w.-]+),(.+)\)\n", (ROOT / "Makefile").read_text(encoding="utf-8")))
"""The arguments of lock.py for each list."""


def required(words: list[str]) -> list[Requirement]:
    """The requirements that a list must satisfy, made by lock.py with these arguments."""
    lines = [] if "--alone" in words else [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    extras = PROJECT["project"]["optional-dependencies"]
    extra_names = [word for word in words if word in extras]
    return [Requirement(line) for name in extra_names for line in extras[name]] + [Requirement(line) for line in lines]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (LISTS / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+", line) for line in lines)
    versions = dict(line.split("==") for line in lines)
    assert len(versions) == len(lines)
    return {canonicalize_name(package): version for package, version in versions.items()}


def test_every_list_is_made_by_make_lock() -> None:
    assert set(LOCK_ARGUMENTS) == {path.name for path in LISTS.glob("*.txt")}


@pytest.mark.parametrize("name", LOCK_ARGUMENTS)
def test_a_list_satisfies_its_extras_and_names_its_lock_arguments(name: str) -> None:
    versions = pins(name)
    for requirement in required(LOCK_ARGUMENTS[name].split()):
        assert canonicalize_name(requirement.name) in versions, requirement
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)].partition("+")[0]), requirement
    header = (LISTS / name).read_text(encoding="utf-8").splitlines()[0]
    for word in LOCK_ARGUMENTS[name].split():
        if word.startswith("--") or word in PROJECT["project"]["optional-dependencies"]:
            assert word in header.split(), header


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lock.py as a module, with `packaging` for pip's copy of it: importing pip would hide setuptools' distutils."""
    for name in ("pip", "pip._vendor", "pip._vendor.packaging", "pip._vendor.packaging.requirements"):
        monkeypatch.setitem(sys.modules, name, packaging.requirements)
    spec = importlib.util.spec_from_file_location("lock", LISTS / "lock.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_what_breaks_torch_on_a_cpu_is_left_out_before_pip_resolves(
    lock: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A stand-in for pip resolves every package to version 1.0 with the same requirements."""
    calls: list[list[str]] = []
    requires = {"requires_dist": ["torch==2", "torchvision==3", "numpy>1; python_version >= '3'", "odd; extra == 'x'"]}

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        names = [word for word in command if re.match(r"[a-z]", word) and word not in ("pip", "install")]
        metadata = [
            {"name": Requirement(name).name, "version": "1.0", **requires} for name in names if not name.startswith("/")
        ]
        Path(command[command.index("--report") + 1]).write_text(
            json.dumps({"install": [{"metadata": item} for item in metadata]})
        )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    lock.main(["cpu"])
    (vllm,) = PROJECT["project"]["optional-dependencies"]["cpu"]
    resolved = calls[-1]
    assert vllm not in resolved
    assert "torch==2" in resolved
    assert not [word for word in resolved if word.startswith(("torchvision", "odd"))]
    printed = capsys.readouterr().out.splitlines()
    assert vllm in printed
    assert "numpy==1.0" in printed
    assert sys.platform in printed[0]
    lock.main(["--alone", "--within", str(tmp_path / "list.txt"), "router"])
    assert calls[-1][-1] == PROJECT["project"]["optional-dependencies"]["router"][0]
    assert calls[-1][calls[-1].index("--constraint") + 1] == str(tmp_path / "list.txt")
