"""Retrieval on small vectors, against results by hand or of a library."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from qembed.eval.tasks import retrieval
from qembed.eval.tasks.retrieval import Collection
from qembed.text.texts import Text
from tests.eval.tasks.conftest import circle, metric_named

RANDOM = np.random.default_rng(2)


COLLECTION = Collection(
    "c",
    "0",
    [Text("q1", "a", "query", "en"), Text("q2", "b", "query", "de")],
    [Text(f"p{row}", f"p{row}", "document", language) for row, language in enumerate(("en", "en", "de", "de"))],
    [{0: 1}, {1: 1, 2: 2}],
)


def test_retrieval_by_hand() -> None:
    baseline = circle(0, 90, 10, 80, 100, 200)  # in degrees: queries at 0 and 90; passages at 10, 80, 100 and 200
    candidate = circle(60, 90, 10, 80, 100, 200)  # the first query has moved
    outcome = retrieval.task(COLLECTION).measure(candidate, baseline)
    # Baseline: q1 finds 0 first; q2 finds 1 and 2, at equal distance, in the order of rows. Candidate: q1 finds 1, 2, 0.
    q2 = (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))
    ndcg = metric_named(outcome, "nDCG@10")
    assert ndcg.baseline == pytest.approx((1 + q2) / 2)
    # From 60 degrees: 80 is 20 away, 100 is 40, 10 is 50: rank 3.
    assert ndcg.candidate == pytest.approx((1 / 2 + q2) / 2)
    assert ndcg.mixed == ndcg.candidate
    assert ndcg.main
    assert ndcg.count == 2
    assert metric_named(outcome, "mAP@10").candidate == pytest.approx((1 / 3 + 1) / 2)
    assert metric_named(outcome, "recall@10").baseline == 1
    groups = {metric.group for metric in outcome.metrics if metric.group}
    assert groups == {"en → en", "de → en", "de → de"}
    # Among the English passages alone the second query finds p1 first.
    assert metric_named(outcome, "nDCG@10", "de → en").baseline == 1
    # Among them the first query of the candidate finds p1 (20 away) before p0 (50 away).
    assert metric_named(outcome, "nDCG@10", "en → en").candidate == pytest.approx(1 / np.log2(3))


def test_a_query_is_not_its_own_result() -> None:
    collection = Collection("c", "0", [Text("x", "same")], [Text("x", "same"), Text("y", "other")], [{1: 1}])
    outcome = retrieval.task(collection).measure(circle(0, 0, 50), circle(0, 0, 50))
    assert metric_named(outcome, "nDCG@10").baseline == 1
    assert metric_named(outcome, "nDCG@10, IVF").baseline == 1


def test_mixed_means_queries_of_the_candidate_on_the_index_of_the_baseline() -> None:
    baseline = circle(0, 90, 0, 90, 45, 45)
    candidate = circle(0, 90, 90, 0, 45, 45)  # the candidate's passages are swapped, its queries are not
    collection = Collection("c", "0", COLLECTION.queries, COLLECTION.passages, [{0: 1}, {1: 1}])
    ndcg = metric_named(retrieval.task(collection).measure(candidate, baseline), "nDCG@10")
    assert ndcg.baseline == ndcg.mixed == 1
    assert ndcg.candidate < 1


def test_ivf_is_exact_with_a_single_cluster_and_approximate_with_more() -> None:
    index = RANDOM.normal(size=(900, 16)).astype(np.float32)
    index /= np.linalg.norm(index, axis=1, keepdims=True)
    queries = index[:50] + 0.1
    exact = NearestNeighbors(n_neighbors=10, algorithm="brute", metric="cosine").fit(index).kneighbors(queries)[1]
    lists = retrieval.through_ivf(queries, index, 10)
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(lists, exact, strict=True)])
    assert 0.3 < share < 1
    small = index[:40]  # one cluster
    exact = NearestNeighbors(n_neighbors=10, algorithm="brute", metric="cosine").fit(small).kneighbors(queries)[1]
    assert [set(rows) for rows in retrieval.through_ivf(queries, small, 10)] == [set(rows) for rows in exact]


def test_ivf_is_compared_with_the_same_sides_exact_search() -> None:
    count = 400
    vectors = RANDOM.normal(size=(10 + count, 16)).astype(np.float32)
    collection = Collection(
        "c",
        "0",
        [Text(f"q{row}", f"q{row}", "query") for row in range(10)],
        [Text(f"p{row}", f"p{row}") for row in range(count)],
        [{row: 1} for row in range(10)],
    )
    outcome = retrieval.task(collection).measure(vectors, vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = NearestNeighbors(n_neighbors=10, algorithm="brute", metric="cosine").fit(unit[10:]).kneighbors(unit[:10])[1]
    lists = retrieval.through_ivf(unit[:10], unit[10:], 10)
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(lists, exact, strict=True)])
    share = metric_named(outcome, "IVF vs exact@10")
    assert share.baseline == share.candidate == pytest.approx(expected)
    assert share.interval == (0, 0)


def test_a_reranker_sorts_the_top_fifty_of_each_side() -> None:
    pairs_scored: list[tuple[int, int]] = []

    def rerank(_: object, __: object, pairs: list[tuple[int, int]]) -> np.ndarray:
        pairs_scored.extend(pairs)
        return np.array([1.0 if pair in ((0, 0), (1, 2)) else 0.0 for pair in pairs])

    baseline, candidate = circle(0, 90, 10, 80, 100, 200), circle(60, 90, 10, 80, 100, 200)
    outcome = retrieval.task(COLLECTION, rerank, "r").measure(candidate, baseline)
    reranked = metric_named(outcome, "nDCG@10, reranked")
    # On both sides the reranker puts p0 first for q1, and p2 before p1 for q2.
    assert reranked.baseline == reranked.candidate == pytest.approx(1)
    assert sorted(pairs_scored) == [(query, row) for query in range(2) for row in range(4)]
