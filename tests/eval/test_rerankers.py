"""`qembed eval --task rerank`: which pairs are scored, what is measured, and which options are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from qembed import rerank
from qembed.cli import group
from qembed.eval import rerankers
from qembed.eval.tasks.retrieval import Collection
from qembed.eval.thresholds import Thresholds
from qembed.text.texts import Text
from tests.checkpoints import write_int4
from tests.eval.readers.test_beir import beir_folder

LETTERS = "abcdefghijklmnopqrstuvwx"


def collection() -> Collection:
    """Three queries and 24 passages; the relevant passage of a query has its letter, one has 24 relevant ones less itself."""
    queries = [Text("a", "a"), Text("q2", "b"), Text("q3", "c")]
    passages = [Text(letter, letter * 3) for letter in LETTERS]
    return Collection("letters", "0", queries, passages, [{1: 1}, {1: 2, 2: 1}, dict.fromkeys(range(20), 1)])


def scored_by(score: Callable[[str, str], float]) -> rerank.Reranker:
    @contextmanager
    def opened() -> Iterator[Any]:
        yield lambda pairs, _: np.array([score(*pair) for pair in pairs], np.float32)

    return rerank.Reranker("fake", {"fake": id(score)}, opened)


def compared(
    candidate: Callable[[str, str], float], baseline: Callable[[str, str], float], **thresholds: Any
) -> dict[str, Any]:
    sides = scored_by(candidate), scored_by(baseline)
    return rerankers.compare(*sides, collection(), None, Thresholds(**thresholds), None, Console(quiet=True))


def by_letter(query: str, passage: str) -> float:
    """Higher for passages near the query in the alphabet."""
    return 1 - abs(ord(query) - ord(passage[0])) / 26


def test_pairs_are_the_relevant_passages_and_others() -> None:
    pairs = rerankers.pairs_of(collection())
    assert [sum(query == number for query, _ in pairs) for number in range(3)] == [
        10,
        10,
        9,
    ]  # 20 of 24 are relevant to the third
    assert {(0, 1), (1, 1), (1, 2)} < set(pairs)
    assert (0, 0) not in pairs  # the passage with the query's own id
    assert sum(row < 20 for query, row in pairs if query == 2) == 5
    assert len(set(pairs)) == len(pairs)
    assert pairs == rerankers.pairs_of(collection())


def test_differences_order_and_ndcg_are_measured() -> None:
    same = compared(by_letter, by_letter)
    assert same["scores"]["difference"]["maximum"] == 0
    assert same["scores"]["kendall_tau"]["mean"] == 1
    moved = compared(lambda query, passage: by_letter(query, passage) / 2, by_letter)
    assert moved["scores"]["kendall_tau"]["mean"] == 1
    assert moved["tasks"][0]["metrics"][0]["difference"] == 0
    assert 0.2 < moved["scores"]["difference"]["mean"] < moved["scores"]["difference"]["p99"] <= 0.5
    turned = compared(lambda query, passage: 1 - by_letter(query, passage), by_letter)
    (metric,) = turned["tasks"][0]["metrics"]
    assert turned["scores"]["kendall_tau"]["mean"] == -1
    assert metric["candidate"] < metric["baseline"] <= 1


def test_a_drop_of_ndcg_misses_the_threshold() -> None:
    turned = compared(lambda query, passage: 1 - by_letter(query, passage), by_letter, max_task_drop=0.01)
    assert not turned["verdict"]["passed"]
    assert turned["gate"][0]["task"] == "rerank"
    assert compared(by_letter, by_letter, max_task_drop=0.01)["verdict"]["passed"]


@pytest.mark.parametrize(
    ("baseline", "candidate", "tau"),
    [
        ([1, 2, 3], [1, 2, 3], 1),
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        ([1, 2, 3], [1, 2, 2], 2 / 3),
        ([1, 1, 2], [5, 1, 6], 1),
        ([1, 1], [1, 2], None),
    ],
)
def test_kendall_tau_is_of_the_pairs_that_the_baseline_tells_apart(
    baseline: list[float], candidate: list[float], tau: float | None
) -> None:
    assert rerankers.kendall_tau(np.array(baseline, float), np.array(candidate, float)) == (
        None if tau is None else pytest.approx(tau)
    )


def evaluate(*options: str | Path) -> Result:
    return CliRunner().invoke(group, ["eval", "--task", "rerank", *map(str, options)])


@pytest.fixture
def int4_reranker(reranker: Path, tmp_path: Path) -> Path:
    write_int4(reranker, tmp_path / "reranker-AWQ-INT4")
    return tmp_path / "reranker-AWQ-INT4"


def test_an_int4_reranker_is_compared_with_its_source(int4_reranker: Path, reranker: Path, tmp_path: Path) -> None:
    corpus = [{"_id": f"d{row}", "text": f"text {row} of many"} for row in range(12)]
    queries = [{"_id": f"q{row}", "text": f"which is text {row}"} for row in range(3)]
    folder = beir_folder(tmp_path / "set", corpus, queries, "q0\td0\t1\nq1\td1\t1\nq2\td2\t1\n")
    result = evaluate("--model", int4_reranker, "--retrieval", folder, "--cache", tmp_path / "cache", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["task"], record["pairs"], record["baseline"]["model"]) == ("rerank", 30, reranker.name)
    with rerank.through_transformers(rerankers.find(str(reranker))).open() as score:
        original = score([("which is text 0", "text 0 of many")], None)
    with rerank.through_transformers(rerankers.find(str(int4_reranker))).open() as score:
        int4 = score([("which is text 0", "text 0 of many")], None)
    assert record["scores"]["difference"]["maximum"] >= abs(float(original[0] - int4[0])) - 1e-5 > 0
    shown = evaluate("--model", int4_reranker, "--retrieval", folder, "--cache", tmp_path / "cache")
    assert "difference of scores: mean" in shown.stdout
    assert "nDCG@10:" in shown.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "sts"], "--task sts"),
        (["--min-cosine", "0.9"], "leave --min-cosine out"),
        (["--report", "a.html"], "leave --report out"),
        (["--engine", "vllm"], "start the reranker with qembed serve, and name it with --url"),
        (["--baseline", "fp32"], "leave --baseline fp32 out"),
    ],
)
def test_options_for_vectors_are_refused(options: list[str], words: str) -> None:
    result = evaluate(*options)
    assert result.exit_code == 2
    assert words in result.stderr
