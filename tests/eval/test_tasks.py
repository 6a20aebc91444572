"""The tasks on small vectors, against results by hand or of a library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from qembed.errors import BadInput
from qembed.eval.tasks import Metric, Outcome, classification, retrieval, sts
from qembed.eval.tasks.classification import Labelled
from qembed.eval.tasks.retrieval import Collection
from qembed.eval.tasks.sts import Pairs
from qembed.text.texts import Text

RANDOM = np.random.default_rng(2)


def metric_named(outcome: Outcome, name: str, group: str | None = None) -> Metric:
    (match,) = [metric for metric in outcome.metrics if metric.name == name and metric.group == group]
    return match


def circle(*degrees: float) -> np.ndarray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)


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


def make_labelled(tests: bool) -> tuple[Labelled, np.ndarray]:
    centres = RANDOM.normal(size=(3, 12))
    numbers = RANDOM.integers(0, 3, 90)
    vectors = (centres[numbers] + 1.6 * RANDOM.normal(size=(90, 12))).astype(np.float32)
    texts = [Text(str(row), str(row), "document", "de" if row % 3 else "en") for row in range(90)]
    split = [row >= 60 for row in range(90)] if tests else None
    return Labelled("l", "0", texts, ["abc"[number] for number in numbers], split), vectors


def test_classification_equals_scikit_learns() -> None:
    data, vectors = make_labelled(tests=True)
    noisy = vectors + RANDOM.normal(size=vectors.shape).astype(np.float32)
    task = classification.task(data)
    outcome = task.measure(noisy, vectors)
    truth = np.array(data.labels)
    for side, name in ((vectors, "baseline"), (noisy, "candidate")):
        unit = side / np.linalg.norm(side, axis=1, keepdims=True)
        model = LogisticRegression(max_iter=1000).fit(unit[:60], truth[:60])
        assert getattr(metric_named(outcome, "accuracy"), name) == pytest.approx(model.score(unit[60:], truth[60:]))
    accuracy = metric_named(outcome, "accuracy")
    assert accuracy.main
    assert accuracy.count == 30
    assert accuracy.baseline is not None
    assert accuracy.candidate is not None
    assert accuracy.interval is not None
    assert accuracy.interval[0] <= accuracy.candidate - accuracy.baseline <= accuracy.interval[1]
    assert {metric.group for metric in outcome.metrics} == {None, "de", "en"}
    weighted = sum(
        metric.baseline * metric.count
        for metric in outcome.metrics
        if metric.name == "accuracy" and metric.group  # type: ignore[operator]
    )
    assert weighted / 30 == pytest.approx(accuracy.baseline)


@pytest.mark.parametrize("classifier", classification.CLASSIFIERS)
def test_without_a_split_every_text_is_predicted_once(classifier: str) -> None:
    data, vectors = make_labelled(tests=False)
    task = classification.task(data, classifier)
    assert task.settings["folds"] == 5
    accuracy = metric_named(task.measure(vectors, vectors), "accuracy")
    assert accuracy.count == 90
    assert accuracy.baseline == accuracy.candidate
    assert accuracy.baseline is not None
    assert 0.4 < accuracy.baseline < 1


def test_labels_that_cannot_be_learned_or_tested_are_refused() -> None:
    def data(labels: list[str], test: list[bool] | None = None) -> Labelled:
        return Labelled("l.csv", "0", [Text(str(row), "x") for row in range(len(labels))], labels, test)

    with pytest.raises(BadInput, match=r"l\.csv: all 4 texts have the same label"):
        classification.task(data(["a"] * 4))
    with pytest.raises(BadInput, match="only one label has more than one text"):
        classification.task(data(["a", "a", "a", "b"]))
    with pytest.raises(BadInput, match="1 label to train on"):
        classification.task(data(["a", "a", "b", "b"], [False, False, True, True]))
    with pytest.raises(BadInput, match="no texts to test on"):
        classification.task(data(["a", "a", "b", "b"], [False] * 4))
    task = classification.task(data(["a", "a", "b", "b", "c"], [False, False, False, True, True]))
    assert task.measure(np.eye(5), np.eye(5)).notes == ["labels to test that were not trained on: c"]


def test_sts_equals_scipys_spearman() -> None:
    count = 40
    first, second = RANDOM.normal(size=(2, count, 8))
    noisy = first + RANDOM.normal(size=first.shape)
    scores = RANDOM.integers(0, 6, count).astype(float)
    texts = [Text(str(row), str(row), "document", "de" if row < 25 else "en") for row in range(count)]
    task = sts.task(Pairs("p", "0", texts, texts, scores.tolist()))
    outcome = task.measure(np.concatenate([noisy, second]), np.concatenate([first, second]))

    def expected(left: np.ndarray, rows: slice) -> float:
        cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(left, second, strict=True)]
        return float(stats.spearmanr(np.array(cosines)[rows], scores[rows]).statistic)

    for group, rows in ((None, slice(None)), ("de", slice(25)), ("en", slice(25, None))):
        metric = metric_named(outcome, "Spearman", group)
        assert metric.baseline == pytest.approx(expected(first, rows))
        assert metric.candidate == pytest.approx(expected(noisy, rows))
        assert metric.main is (group is None)


def test_pairs_that_cannot_be_ranked_are_refused_or_left_out() -> None:
    texts = [Text(str(row), "x") for row in range(4)]
    with pytest.raises(BadInput, match="all 4 pairs have the same score"):
        sts.task(Pairs("p.csv", "0", texts, texts, [1.0] * 4))
    with pytest.raises(BadInput, match="2 pairs; at least three"):
        sts.task(Pairs("p.csv", "0", texts[:2], texts[:2], [1.0, 2.0]))
    vectors = RANDOM.normal(size=(8, 3))
    broken = vectors.copy()
    broken[2] = np.nan
    outcome = sts.task(Pairs("p", "0", texts, texts, [1.0, 2, 3, 4])).measure(broken, vectors)
    assert metric_named(outcome, "Spearman").count == 3
    assert outcome.notes == ["1 pairs without a cosine on either side are left out"]


def test_the_built_in_sets_have_the_documented_sizes_and_languages() -> None:
    from qembed.eval.readers import builtin

    collection = builtin.retrieval()
    assert len(collection.queries) == 64
    assert {text.language for text in collection.queries} == {"en", "de", "es", "zh"}
    assert len(collection.passages) > 200
    assert all(len(grades) == 4 for grades in collection.relevant)
    for text, grades in zip(collection.queries, collection.relevant, strict=True):
        (exact_match,) = [row for row, grade in grades.items() if grade == 2]
        assert collection.passages[exact_match].language == text.language
    texts = [text.text for text in collection.passages]
    assert len(set(texts)) == len(texts)
    data = builtin.classification()
    assert len(data.labels) == len({text.text for text in data.texts}) == 192
    assert {data.labels.count(label) for label in data.labels} == {32}
    pairs = builtin.sts()
    assert len(pairs.scores) > 50
    assert min(pairs.scores) >= 0
    assert max(pairs.scores) <= 5
    assert Path(builtin.DATA, "retrieval", "qrels", "test.tsv").exists()
