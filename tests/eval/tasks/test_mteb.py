"""mteb's tasks through qembed's client: mteb's own scores for both sides, with each task's prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy import stats

from qembed import bootstrap
from qembed.cli import group
from qembed.eval.tasks import mteb_rows
from tests.eval.conftest import FakeServer

pytestmark = pytest.mark.slow

mteb = pytest.importorskip("mteb", reason="the extra mteb is not installed")
PAIRS = [("a cat", "the cat", 5.0), ("a dog", "the stone", 1.0), ("rain", "snow", 3.0), ("sun", "a boat", 0.5), ("x", "y", 2.0)]


@pytest.fixture
def local_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of mteb's classes with local data, because tests do not reach the hub."""
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
    local = {"LocalSTS": Local, "LocalRetrieval": retrieval, "LocalClassification": classification, "TwoSTS": two_languages}
    monkeypatch.setattr(mteb, "get_task", lambda name: local[name]() if name in local else real(name))


def make_metadata(name: str, kind: str, score: str, **more: Any) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name, description="local", dataset={"path": "local", "revision": "1"}, type=kind, category="t2t",
        modalities=["text"], eval_splits=["test"], main_score=score, **{"eval_langs": ["eng-Latn"], **more},
    )  # fmt: skip


def retrieval() -> Any:
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Local(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = make_metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")

        def load_data(self, **_: Any) -> None:
            corpus = [{"id": f"d{row}", "title": "", "text": f"passage {row}"} for row in range(40)]
            queries = [{"id": f"q{row}", "text": f"question {row}"} for row in range(12)]
            relevant = {f"q{row}": {f"d{row}": 2, f"d{row + 20}": 1, f"d{row + 1}": 0} for row in range(12)}
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries),
                        "relevant_docs": relevant, "top_ranked": None,
                    }
                }
            }  # fmt: skip
            self.data_loaded = True

    return Local()


def classification() -> Any:
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.classification import AbsTaskClassification

    class Local(AbsTaskClassification):  # type: ignore[misc]
        metadata = make_metadata("LocalClassification", "Classification", "accuracy")
        samples_per_label = 4

        def load_data(self, **_: Any) -> None:
            parts = {"train": range(24), "test": range(24, 60)}
            self.dataset = DatasetDict(
                {
                    name: Dataset.from_dict({"text": [f"text {row}" for row in rows], "label": [row % 3 for row in rows]})
                    for name, rows in parts.items()
                }
            )
            self.data_loaded = True

    return Local()


def two_languages() -> Any:
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS

    class Local(AbsTaskSTS):  # type: ignore[misc]
        metadata = make_metadata("TwoSTS", "STS", "cosine_spearman", eval_langs={"en": ["eng-Latn"], "de": ["deu-Latn"]})

        def load_data(self, **_: Any) -> None:
            self.dataset = {}
            for language in ("en", "de"):
                first, second, score = zip(*PAIRS * 2, strict=True)
                columns = {"sentence1": [f"{language} {sentence}" for sentence in first], "sentence2": second, "score": score}
                self.dataset[language] = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

    return Local()


def run(start_server: Callable[[], FakeServer], tmp_path: Path, *more: str) -> tuple[Result, list[FakeServer]]:
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
    servers = [start_server(), start_server()]
    servers[0].noise = 0.5
    options = ("--url", servers[0].url, "--baseline-url", servers[1].url, "--data", str(tmp_path / "few.txt"))
    return CliRunner().invoke(group, ["eval", *options, *more]), servers


@pytest.mark.usefixtures("local_task")
def test_scores_equal_a_computation_by_hand(start_server: Callable[[], FakeServer], tmp_path: Path) -> None:
    result, servers = run(start_server, tmp_path, "--task", "mteb:LocalSTS", "--json")
    assert result.exit_code == 0, result.stderr
    (task,) = json.loads(result.stdout)["tasks"]
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


@pytest.mark.usefixtures("local_task")
@pytest.mark.parametrize(
    ("name", "score", "count"),
    [("LocalSTS", "cosine_spearman", 5), ("LocalRetrieval", "ndcg_at_10", 12), ("LocalClassification", "accuracy", 36)],
)
def test_a_score_has_an_interval_if_its_rows_are_known(
    start_server: Callable[[], FakeServer], tmp_path: Path, name: str, score: str, count: int
) -> None:
    result, _ = run(start_server, tmp_path, "--task", f"mteb:{name}", "--json")
    assert result.exit_code == 0, result.stderr
    (task,) = json.loads(result.stdout)["tasks"]
    (metric,) = task["metrics"]
    assert (metric["name"], metric["count"], metric["main"]) == (score, count, True)
    low, high = metric["interval"]
    assert low <= metric["difference"] <= high
    assert low < high
    assert task["notes"] == []


@pytest.mark.usefixtures("local_task")
def test_subsets_are_reported_beside_the_whole(start_server: Callable[[], FakeServer], tmp_path: Path) -> None:
    result, _ = run(start_server, tmp_path, "--task", "mteb:TwoSTS", "--json")
    assert result.exit_code == 0, result.stderr
    whole, *parts = json.loads(result.stdout)["tasks"][0]["metrics"]
    assert (whole["group"], sorted(part["group"] for part in parts)) == (None, ["de", "en"])
    assert [whole["main"], *(part["main"] for part in parts)] == [True, False, False]
    assert whole["candidate"] == pytest.approx(np.mean([part["candidate"] for part in parts]))
    assert (whole["count"], parts[0]["count"]) == (20, 10)
    # The mean of two independently resampled parts has a narrower interval than the wider of them.
    widths = [metric["interval"][1] - metric["interval"][0] for metric in (whole, *parts)]
    assert widths[0] < max(widths[1:])


def test_an_interval_by_hand() -> None:
    """The bootstrap interval of the mean difference per row."""
    random = np.random.default_rng(3)
    left, right = (mteb_rows.Rows(random.random(6)) for _ in range(2))
    interval = mteb_rows.interval([left], [right])
    assert interval == pytest.approx(bootstrap.of_mean(left.values - right.values))


def test_a_score_that_differs_from_its_rows_mean_has_no_interval() -> None:
    task = SimpleNamespace(metadata=SimpleNamespace(main_score="accuracy"), label_column_name="label")
    data = {"label": [0, 1, 1, 0]}
    predicted = [[0, 1, 0, 0], [0, 1, 1, 1]]
    rows = mteb_rows.read(predicted, data, task, 0.75)
    assert rows is not None
    assert list(rows.values) == [1, 1, 0.5, 0.5]
    assert mteb_rows.read(predicted, data, task, 0.8) is None
    assert mteb_rows.read(predicted, {"label": [0, 1]}, task, 0.75) is None
    task.metadata.main_score = "v_measure"
    assert mteb_rows.read(predicted, data, task, 0.75) is None


def test_an_unknown_mteb_task_is_refused(start_server: Callable[[], FakeServer], tmp_path: Path) -> None:
    result, _ = run(start_server, tmp_path, "--task", "mteb:NoSuchTask")
    assert result.exit_code == 2
    assert "mteb:NoSuchTask: mteb" in result.stderr.splitlines()[-1]
    assert "has no such task" in result.stderr.splitlines()[-1]


def test_data_that_cannot_be_downloaded_is_one_line(
    start_server: Callable[[], FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mteb.abstasks.sts import AbsTaskSTS

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("the hub\ncannot be reached")

    monkeypatch.setattr(AbsTaskSTS, "load_data", unreachable)
    result, servers = run(start_server, tmp_path, "--task", "mteb:STS12")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "qembed: mteb:STS12: its data cannot be loaded (ConnectionError: the hub cannot be reached)"
    )
    assert servers[0].inputs == []
