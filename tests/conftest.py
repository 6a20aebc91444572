"""How tests are shared out to pytest-xdist's workers, and the last lines of a run. Fixtures of all tests."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from qembed.vllm import machine
from tests.checkpoints import converted_reranker, fp16, int4, int4_checkpoint, make_checkpoint, reranker

__all__ = ["converted_reranker", "fp16", "int4", "int4_checkpoint", "make_checkpoint", "reranker"]

MARKS = ("vllm", "ray", "slow")
SERVER = "int4_server"
"""A server for the whole run: files that name it run in the same worker of pytest-xdist."""
STARTS_VLLM = "mark.vllm"
STRICT = "QEMBED_STRICT_SKIPS"
"""If set to 1, a skip for a reason other than EXPECTED fails the run. CI sets it, because it installs everything."""
EXPECTED = (
    "no NVIDIA GPU",
    "no GPU with 8-bit floats",
    "no AVX-VNNI here",
    "no AMX here",
    "no AVX-512 VNNI here",
    "vLLM's build for this CPU has no INT4 kernel",
    "AutoAWQ is not installed",  # make test-autoawq runs these
    "needs unprivileged user namespaces",
)
INSTALL = re.compile(r"Debian: apt-get install ([\w.+-]+)|Debian's package ([\w.+-]+)\)")
MAKE = re.compile(r"make (build/\w+/installed|test-\w+)")

left_out: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        left_out[next((mark for mark in MARKS if item.get_closest_marker(mark)), "other")] += 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """pytest-xdist: sort the files, so that at the end no worker waits for the other's long file.

    The server of the whole run starts while no other vLLM does: processes with the same libraries share their pages, and it
    compares its memory with its plan.
    """
    if hasattr(config, "workerinput"):
        places: dict[Path, int] = {}
        for item in items:
            places[item.path] = min(_place(item), places.get(item.path, len(MARKS)))
        items.sort(key=lambda item: places[item.path])


def _place(item: pytest.Item) -> int:
    if _uses_server(item.path):
        return 0
    marks = {mark for mark in MARKS if item.get_closest_marker(mark)}
    return 1 if marks & {"ray", "slow"} else 2 if marks else 3


@cache
def _uses_server(file: Path) -> bool:
    """Whether a file needs the server, or on a GPU any vLLM, which must not start while another takes memory of the GPU."""
    text = file.read_text(encoding="utf-8")
    return SERVER in text or (STARTS_VLLM in text and machine.first_gpu() is not None)


class Scheduling(LoadFileScheduling):
    """Gives each file to one worker, and all files that use the server of the whole run to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return SERVER if _uses_server(self.config.rootpath / file) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    """pytest-xdist: use `Scheduling` where `--dist loadfile` is given."""
    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped."""
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


def missing(reasons: Sequence[str]) -> list[str]:
    """Commands that install what skipped tests need."""
    packages = sorted({match[1] or match[2] for text in reasons for match in INSTALL.finditer(text)})
    targets = sorted({match[1] for text in reasons for match in MAKE.finditer(text)})
    return [*([f"apt-get install {' '.join(packages)}"] if packages else []), *(f"make {target}" for target in targets)]


def unexpected(reasons: Sequence[str]) -> list[str]:
    return sorted({text for text in reasons if not any(known in text for known in EXPECTED)})


def skips(config: pytest.Config) -> list[str]:
    """The reason of each skipped test."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else [reason(report) for report in reporter.stats.get("skipped", [])]


def is_strict(config: pytest.Config) -> bool:
    """Whether strict skips are on and this process is not a worker of pytest-xdist."""
    return os.environ.get(STRICT) == "1" and not hasattr(config, "workerinput")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """pytest-xdist: all workers leave out the same tests, so one of them is counted."""
    left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}) if not left_out else {})


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(left_out)
    if is_strict(session.config) and unexpected(skips(session.config)) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the last lines of the run."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    reasons = skips(config)
    if left_out:
        counts = ", ".join(f"{count} {mark}" for mark, count in left_out.most_common())
        reporter.write_line(f"left out: {counts} (`make test` runs them)")
    if is_strict(config) and (others := unexpected(reasons)):
        reporter.write_line(f"{STRICT}: unexpected skips: {'; '.join(others)}", red=True)
    if commands := missing(reasons):
        reporter.write_line(f"to run the skipped tests too: {'; '.join(commands)}")
