"""The two examples of docs/search.md, with a real server of the sample's INT4 checkpoint and the bundled data."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.launcher import Launched

pytestmark = pytest.mark.vllm

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, server: Launched) -> str:
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, "--url", server.url.removesuffix("/v1")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_product_search(int4_server: Launched) -> None:
    out = run("product_search.py", int4_server)
    lines = [line for line in out.splitlines() if "%" in line]
    rows = {line.split("  ")[0]: [float(number) for number in re.findall(r"[\d.]+", line)] for line in lines}
    vectors_alone, reranked = rows["vectors alone"], rows["reranked by LambdaMART"]
    assert vectors_alone[0] > 0.7
    assert reranked[0] > vectors_alone[0]
    assert vectors_alone[2] == reranked[2] > 90, "the reranker's candidates are those of the vectors"


def test_ticket_classification(int4_server: Launched) -> None:
    out = run("ticket_classification.py", int4_server)
    scores = re.findall(r"^(all four languages|English alone) +(\w+) +([\d.]+)", out, re.MULTILINE)
    assert len(scores) == 10
    accuracy = {(trained, tested): float(score) for trained, tested, score in scores}
    assert accuracy["all four languages", "all"] > 0.5, "six topics: chance is 0.17"
    assert accuracy["English alone", "all"] > 0.3
