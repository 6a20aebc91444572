"""nDCG, mAP and recall against trec_eval, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval

from qembed.eval.tasks import ranking

RANDOM = np.random.default_rng(11)


def random_lists(queries: int = 25, passages: int = 60, depth: int = 40) -> tuple[np.ndarray, list[dict[int, int]]]:
    lists = np.stack([RANDOM.permutation(passages)[:depth] for _ in range(queries)])
    relevant = [
        {int(row): int(RANDOM.integers(1, 4)) for row in RANDOM.choice(passages, RANDOM.integers(1, 20), replace=False)}
        for _ in range(queries)
    ]
    return lists, relevant


@pytest.mark.parametrize(
    ("ours", "measure", "depth"),
    [
        (ranking.ndcg, "ndcg_cut", 10),
        (ranking.average_precision, "map_cut", 10),
        (ranking.recall, "recall", 10),
        (ranking.recall, "recall", 100),
    ],
)
def test_metrics_equal_those_of_trec_eval(ours: object, measure: str, depth: int) -> None:
    lists, relevant = random_lists()
    qrels = {str(query): {str(row): grade for row, grade in judgements.items()} for query, judgements in enumerate(relevant)}
    run = {str(query): {str(row): float(len(rows) - rank) for rank, row in enumerate(rows)} for query, rows in enumerate(lists)}
    scores = pytrec_eval.RelevanceEvaluator(qrels, {f"{measure}.{depth}"}).evaluate(run)
    expected = [scores[str(query)][f"{measure}_{depth}"] for query in range(len(lists))]
    grades = [list(judgements.values()) for judgements in relevant]
    assert ours(ranking.gains(lists, relevant), grades, depth) == pytest.approx(expected)  # type: ignore[operator]


def test_metrics_by_hand() -> None:
    # Passages 4 (grade 2), 7 and 9 (grade 1) are relevant; 7 is at rank 1 and 4 at rank 3.
    gains = ranking.gains(np.array([[7, 1, 4, -1]]), [{4: 2, 7: 1, 9: 1}])
    assert gains.tolist() == [[1, 0, 2, 0]]
    grades = [[2, 1, 1]]
    best = 2 + 1 / np.log2(3) + 1 / 2
    assert ranking.ndcg(gains, grades, 10) == pytest.approx([(1 + 2 / 2) / best])
    assert ranking.ndcg(gains, grades, 1) == pytest.approx([1 / 2])
    assert ranking.average_precision(gains, grades, 10) == pytest.approx([(1 / 1 + 2 / 3) / 3])
    assert ranking.recall(gains, grades, 10) == pytest.approx([2 / 3])
    assert ranking.recall(gains, grades, 2) == pytest.approx([1 / 3])
