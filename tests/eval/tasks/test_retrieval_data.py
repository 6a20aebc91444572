"""Irregularities of public retrieval sets: dangling judgements, empty passages, queries that are passages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from qembed.errors import BadInput
from qembed.eval.readers import beir
from qembed.eval.tasks import Metric, Outcome, retrieval
from qembed.eval.tasks.retrieval import Collection
from qembed.text.texts import Text
from tests.eval.readers.test_beir import beir_folder
from tests.eval.tasks.conftest import circle, metric_named

SUBJECTS = ("printer", "music", "backup", "calendar", "photo", "network")


def bags_of_words(texts: Sequence[Text]) -> np.ndarray:
    """A vector per text from its words; the topic words of the small sets weigh most."""
    lists = [text.text.lower().rstrip("?.").split() for text in texts]
    words = sorted({word for words in lists for word in words})
    weights = np.array([10 if word in SUBJECTS else 1 for word in words])
    return np.array([[word in words_ for word in words] for words_ in lists], np.float32) * weights


def measure(collection: Collection, vectors: np.ndarray | None = None) -> Outcome:
    task = retrieval.task(collection)
    vectors = bags_of_words(task.texts) if vectors is None else vectors
    return task.measure(vectors, vectors)


def test_a_relevant_passage_may_have_the_id_of_its_query() -> None:
    collection = Collection("faq", "0", [Text("1", "question")], [Text("1", "answer"), Text("2", "other")], [{0: 1}])
    outcome = measure(collection, circle(0, 0, 50))
    assert metric_named(outcome, "nDCG@10").baseline == 1
    assert outcome.notes == []


def test_a_querys_own_passage_is_left_out_across_languages_too() -> None:
    queries = [Text("a", "a", "query", "en"), Text("b", "b", "query", "en")]
    passages = [Text("a", "a", "document", "en"), Text("p", "p", "document", "en"), Text("r", "r", "document", "de")]
    outcome = measure(Collection("c", "0", queries, passages, [{1: 1}, {2: 1}]), circle(0, 50, 0, 10, 50))
    assert metric_named(outcome, "nDCG@10", "en → en").baseline == 1


def test_metrics_equal_those_of_trec_eval_on_a_set_with_all_irregularities(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    corpus = [{"_id": f"d{row}", "title": "t" if row % 3 else "", "text": f"text {row}"} for row in range(60)]
    corpus += [{"_id": f"blank{row}", "title": "", "text": "\u200b" if row else ""} for row in range(2)]
    corpus += [{"_id": f"q{row}", "title": "self", "text": f"question {row}"} for row in range(0, 20, 2)]
    queries = [{"_id": f"q{row}", "text": f"question {row}"} for row in range(20)]
    rows = [(f"q{row}", f"d{random.integers(60)}", int(random.integers(0, 3))) for row in range(20) for _ in range(4)]
    dangling = [("q1", "gone", 2), ("q2", "blank0", 1), ("q3", "blank1", 1), ("gone", "d1", 1), ("q4", "lost", 1)]
    lines = [f"{query}\t{passage}\t{grade}\n" for query, passage, grade in (*rows, *dangling)]
    collection = beir.read(beir_folder(tmp_path / "set", corpus, queries, "query-id\tcorpus-id\tscore\n" + "".join(lines)))
    assert sorted(note for note in collection.notes if "judgement" in note) == [
        "left out: 1 judgement of queries that are not in queries.jsonl",
        "left out: 2 judgements of a passage that has another grade for the same query further down",
        "left out: 2 judgements of passages that are not in corpus.jsonl",
        "left out: 2 judgements of passages without title and text",
    ]
    count = len(collection.queries)
    vectors = random.normal(size=(count + len(collection.passages), 16)).astype(np.float32)
    for query, text in enumerate(collection.queries):  # a query that is a passage finds itself first
        own = [row for row, passage in enumerate(collection.passages) if passage.id == text.id]
        vectors[[count + row for row in own]] = vectors[query]
    outcome = measure(collection, vectors)

    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit[:count] @ unit[count:].T
    qrels: dict[str, dict[str, int]] = {}
    for query, passage, grade in rows:
        qrels.setdefault(query, {})[passage] = grade
    qrels = {query: grades for query, grades in qrels.items() if any(grades.values())}
    run = {
        text.id: {
            passage.id: float(cosines[row, place])
            for place, passage in enumerate(collection.passages)
            if passage.id != text.id  # as in BEIR's evaluation
        }
        for row, text in enumerate(collection.queries)
    }
    names = {"nDCG@10": "ndcg_cut_10", "mAP@10": "map_cut_10", "recall@10": "recall_10"}
    measures = {"ndcg_cut.10", "map_cut.10", "recall.10"}
    scores = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    assert len(scores) == count
    for name, key in names.items():
        metric: Metric = metric_named(outcome, name)
        assert metric.baseline == pytest.approx(np.mean([values[key] for values in scores.values()]))


def test_a_set_without_valid_judgements_is_refused_with_their_number(tmp_path: Path) -> None:
    folder = beir_folder(tmp_path / "set", qrels="q1\tp8\t1\nq1\tp9\t1\n")
    with pytest.raises(BadInput, match="2 judgements of passages that are not in corpus"):
        beir.read(folder)
