"""The pinned lists: whole, made as the Makefile says, of what pyproject.toml asks for; how they are made is tried offline."""

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
MADE = dict(re.findall(r"\$\(call locked,([\w.-]+),(.+)\)\n", (ROOT / "Makefile").read_text(encoding="utf-8")))
"""The words that lock.py gets for each list."""


def asked(words: list[str]) -> list[Requirement]:
    """What a list made with these words has to hold."""
    lines = [] if "--alone" in words else [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    extras = PROJECT["project"]["optional-dependencies"]
    named = [word for word in words if word in extras]
    return [Requirement(line) for name in named for line in extras[name]] + [Requirement(line) for line in lines]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (LISTS / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+", line) for line in lines)
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return {canonicalize_name(one): version for one, version in found.items()}


def test_every_list_is_made_by_make_lock() -> None:
    assert set(MADE) == {path.name for path in LISTS.glob("*.txt")}


@pytest.mark.parametrize("name", MADE)
def test_a_list_has_what_its_extras_ask_for_and_says_how_it_is_made(name: str) -> None:
    found = pins(name)
    for one in asked(MADE[name].split()):
        assert canonicalize_name(one.name) in found, one
        assert one.specifier.contains(found[canonicalize_name(one.name)].partition("+")[0]), one
    said = (LISTS / name).read_text(encoding="utf-8").splitlines()[0]
    for word in MADE[name].split():
        if word.startswith("--") or word in PROJECT["project"]["optional-dependencies"]:
            assert word in said.split(), said


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, without pip's code: to import that puts the standard library's distutils before setuptools'."""
    for name in ("pip", "pip._vendor", "pip._vendor.packaging", "pip._vendor.packaging.requirements"):
        monkeypatch.setitem(sys.modules, name, packaging.requirements)
    spec = importlib.util.spec_from_file_location("lock", LISTS / "lock.py")
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_what_breaks_torch_on_a_cpu_is_left_out_before_pip_resolves(
    lock: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Instead of pip, a stand-in that knows two packages."""
    calls: list[list[str]] = []
    wants = {"requires_dist": ["torch==2", "torchvision==3", "numpy>1; python_version >= '3'", "odd; extra == 'x'"]}

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        names = [word for word in command if re.match(r"[a-z]", word) and word not in ("pip", "install")]
        metadata = [{"name": Requirement(one).name, "version": "1.0", **wants} for one in names if not one.startswith("/")]
        Path(command[command.index("--report") + 1]).write_text(
            json.dumps({"install": [{"metadata": one} for one in metadata]})
        )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    lock.main(["cpu"])
    (vllm,) = PROJECT["project"]["optional-dependencies"]["cpu"]
    last = calls[-1]
    assert vllm not in last
    assert "torch==2" in last
    assert not [word for word in last if word.startswith(("torchvision", "odd"))]
    printed = capsys.readouterr().out.splitlines()
    assert vllm in printed
    assert "numpy==1.0" in printed
    assert sys.platform in printed[0]
    lock.main(["--alone", "--within", str(tmp_path / "list.txt"), "router"])
    assert calls[-1][-1] == PROJECT["project"]["optional-dependencies"]["router"][0]
    assert calls[-1][calls[-1].index("--constraint") + 1] == str(tmp_path / "list.txt")
