"""mteb's tasks through our client: its own scores, of either side's vectors, with the prompts that the task asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy import stats

from qembed.cli import group
from tests.eval.conftest import FakeServer

mteb = pytest.importorskip("mteb", reason="the extra mteb is not installed")
PAIRS = [("a cat", "the cat", 5.0), ("a dog", "the stone", 1.0), ("rain", "snow", 3.0), ("sun", "a boat", 0.5), ("x", "y", 2.0)]


@pytest.fixture
def local_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of mteb's own classes whose data is here: the hub is out of reach of a test."""
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskSTS):  # type: ignore[misc]
        metadata = TaskMetadata(
            name="LocalSTS", description="pairs", dataset={"path": "local", "revision": "1"}, type="STS", category="t2t",
            modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman",
            prompt="Retrieve semantically similar text",
        )  # fmt: skip
        min_score = 0
        max_score = 5

        def load_data(self, **_: Any) -> None:
            first, second, score = zip(*PAIRS, strict=True)
            self.dataset = {"test": Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score})}
            self.data_loaded = True

    real = mteb.get_task
    monkeypatch.setattr(mteb, "get_task", lambda name: Local() if name == "LocalSTS" else real(name))


def run(start_server: Callable[[], FakeServer], tmp_path: Path, *more: str) -> tuple[Result, list[FakeServer]]:
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
    servers = [start_server(), start_server()]
    servers[0].noise = 0.5
    given = ("--url", servers[0].url, "--baseline-url", servers[1].url, "--data", str(tmp_path / "few.txt"))
    return CliRunner().invoke(group, ["eval", *given, *more]), servers


@pytest.mark.usefixtures("local_task")
def test_scores_are_mtebs_own(start_server: Callable[[], FakeServer], tmp_path: Path) -> None:
    done, servers = run(start_server, tmp_path, "--task", "mteb:LocalSTS", "--json")
    assert done.exit_code == 0, done.stderr
    (task,) = json.loads(done.stdout)["tasks"]
    assert task["task"] == "mteb:LocalSTS"
    (metric,) = task["metrics"]
    assert metric["name"] == "cosine_spearman"
    assert metric["main"]
    prompt = "Instruct: Retrieve semantically similar text\nQuery:"
    for server, side in zip(servers, ("candidate", "baseline"), strict=True):
        assert prompt + "a cat" in server.inputs

        def cosine(first: str, second: str, server: FakeServer = server) -> float:
            left, right = (np.array(server.vector(prompt + text)) for text in (first, second))
            return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))

        expected = stats.spearmanr([cosine(a, b) for a, b, _ in PAIRS], [score for *_, score in PAIRS]).statistic
        assert metric[side] == pytest.approx(expected, abs=1e-6)


def test_a_task_that_mteb_does_not_know(start_server: Callable[[], FakeServer], tmp_path: Path) -> None:
    done, _ = run(start_server, tmp_path, "--task", "mteb:NoSuchTask")
    assert done.exit_code == 2
    assert "mteb:NoSuchTask: mteb" in done.stderr.splitlines()[-1]
    assert "has no such task" in done.stderr.splitlines()[-1]


def test_data_that_cannot_be_had(
    start_server: Callable[[], FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mteb.abstasks.sts import AbsTaskSTS

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("the hub\ncannot be reached")

    monkeypatch.setattr(AbsTaskSTS, "load_data", unreachable)
    done, servers = run(start_server, tmp_path, "--task", "mteb:STS12")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        "qembed: mteb:STS12: its data cannot be loaded (ConnectionError: the hub cannot be reached)"
    )
    assert servers[0].inputs == []
