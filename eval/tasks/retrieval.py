"""Retrieval: exact search, FAISS's IVF-Flat, across languages, and with a reranker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap
from qembed.errors import MissingExtra
from qembed.eval import fidelity, neighbours
from qembed.eval.tasks import Metric, Outcome, Task, Vectors, ranking
from qembed.installation import how_to_install
from qembed.rerank import Rerank
from qembed.text.display import counted
from qembed.text.texts import Text
from qembed.vectors import ivf

DEPTH = 100
RERANKED = 50

Lists = NDArray[np.intp]
Relevant = Sequence[Mapping[int, int]]
Score = Callable[[NDArray[np.float64], Sequence[Sequence[int]], int], NDArray[np.float64]]


@dataclass(frozen=True)
class Collection:
    """Queries, passages, and for each query the grades (from 1) of its relevant passage rows, at least one.

    `notes` are caveats for the reader.
    """

    name: str
    sha256: str
    queries: list[Text]
    passages: list[Text]
    relevant: list[dict[int, int]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gains:
    """The grades [q, depth] of each side's results."""

    baseline: NDArray[np.float64]
    candidate: NDArray[np.float64]
    mixed: NDArray[np.float64] | None


@dataclass(frozen=True)
class Rankings:
    """Ranked passage rows [q, depth] of the baseline, of the candidate, and of the candidate's queries on the baseline's
    index.
    """

    baseline: Lists
    candidate: Lists
    mixed: Lists | None = None


def task(collection: Collection, rerank: Rerank | None = None, reranker: str | None = None) -> Task:
    """The task on `collection`; `rerank` scores its (query, passage) pairs, `reranker` is its name.

    Raises:
        MissingExtra: FAISS is not installed.
    """
    check_faiss()
    count = len(collection.queries)

    def measure(candidate: Vectors, baseline: Vectors) -> Outcome:
        sides = [(unit[:count], unit[count:]) for unit in map(fidelity.unit_or_zero, (candidate, baseline))]
        return _measure(collection, sides[0], sides[1], rerank)

    sizes = {"queries": count, "passages": len(collection.passages)}
    return Task(
        name="retrieval",
        data={"name": collection.name, "sha256": collection.sha256, **sizes},
        texts=[*collection.queries, *collection.passages],
        measure=measure,
        settings={"index": _settings(len(collection.passages)), "reranker": reranker, "reranked": RERANKED if rerank else None},
    )


def check_faiss() -> None:
    """Check that FAISS is installed.

    Raises:
        MissingExtra: it is not.
    """
    try:
        import faiss  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--task retrieval needs FAISS: {how_to_install('eval')}") from error


def through_ivf(queries: NDArray[np.float32], index: NDArray[np.float32], depth: int) -> Lists:
    """As `neighbours.nearest`, through FAISS's IVF-Flat with the settings of `_settings`; −1 if fewer are found."""
    rows: Lists = ivf_index(index).search(queries, depth)[1].astype(np.intp)
    return rows


def ivf_index(vectors: NDArray[np.float32]) -> Any:
    """FAISS's IVF-Flat of unit vectors [n, d], as `qembed index --kind ivf-flat` builds it."""
    settings = _settings(len(vectors))
    rows = ivf.training_rows(len(vectors), settings["clusters"])
    index = ivf.trained(vectors.shape[1], settings["clusters"], vectors[rows])
    index.add(vectors)
    index.nprobe = settings["probed"]
    return index


def _settings(passages: int) -> dict[str, Any]:
    clusters = ivf.clusters(passages)
    return {"type": "IVF-Flat", "clusters": clusters, "probed": max(1, round(clusters**0.5))}


def _measure(
    collection: Collection,
    candidate: tuple[NDArray[np.float32], NDArray[np.float32]],
    baseline: tuple[NDArray[np.float32], NDArray[np.float32]],
    rerank: Rerank | None,
) -> Outcome:
    relevant = collection.relevant
    depth = min(DEPTH, len(collection.passages))
    own = _own_passages(collection)
    rankings = Rankings(
        baseline=_search(*baseline, depth, own),
        candidate=_search(*candidate, depth, own),
        mixed=_search(candidate[0], baseline[1], depth, own),
    )
    gains = _gains(rankings, relevant)
    metrics = [
        _metric("nDCG@10", gains, relevant, ranking.ndcg, 10, main=True),
        _metric("mAP@10", gains, relevant, ranking.average_precision, 10),
        _metric("recall@10", gains, relevant, ranking.recall, 10),
        _metric("recall@100", gains, relevant, ranking.recall, 100),
        *_through_ivf(rankings, candidate, baseline, relevant, own),
        *_across_languages(collection, candidate, baseline, own),
    ]
    if rerank is not None:
        metrics.append(_reranked(collection, rankings, rerank))
    notes = list(collection.notes)
    if own is not None:
        queries = counted(int((own >= 0).sum()), "query", "queries")
        notes.append(f"{queries} with a passage of the same id: that passage is no result, as in BEIR")
    return Outcome(metrics, notes)


def _search(queries: NDArray[np.float32], passages: NDArray[np.float32], depth: int, own: Lists | None) -> Lists:
    """The nearest `depth` passages without each query's `own` (`_own_passages`)."""
    if own is None:
        return neighbours.nearest(queries, passages, depth)
    wider = neighbours.nearest(queries, passages, min(depth + 1, len(passages)))
    return without(wider, own, depth)


def without(lists: Lists, own: Lists, depth: int) -> Lists:
    """`lists` [q, k] without each query's `own` row [q] (−1: none), cut to `depth` and filled with −1."""
    lists_without = np.full((len(lists), depth), -1, np.intp)
    for place, (rows, own_row) in enumerate(zip(lists, own, strict=True)):
        others = rows[rows != own_row][:depth] if own_row >= 0 else rows[:depth]
        lists_without[place, : len(others)] = others
    return lists_without


def _own_passages(collection: Collection) -> Lists | None:
    """For each query the passage with the query's id, −1 if there is none; None if no query has one.

    As in BEIR, whose Quora and ArguAna take their queries from the passages: what a query finds first there is itself. A
    passage that is judged relevant is not the query itself: other sets give a question and its answer the same id.
    """
    rows = {text.id: row for row, text in enumerate(collection.passages)}
    own = np.array([rows.get(text.id, -1) for text in collection.queries], np.intp)
    for query, relevant in enumerate(collection.relevant):
        if own[query] in relevant:
            own[query] = -1
    return own if (own >= 0).any() else None


def _gains(rankings: Rankings, relevant: Relevant) -> Gains:
    return Gains(
        baseline=ranking.gains(rankings.baseline, relevant),
        candidate=ranking.gains(rankings.candidate, relevant),
        mixed=None if rankings.mixed is None else ranking.gains(rankings.mixed, relevant),
    )


def _metric(
    name: str,
    gains: Gains,
    relevant: Relevant,
    score: Score,
    depth: int,
    *,
    group: str | None = None,
    main: bool = False,
) -> Metric:
    grades = [list(of_query.values()) for of_query in relevant]
    mixed = None if gains.mixed is None else float(score(gains.mixed, grades, depth).mean())
    baseline, candidate = (score(side, grades, depth) for side in (gains.baseline, gains.candidate))
    return paired(name, baseline, candidate, group=group, mixed=mixed, main=main)


def paired(
    name: str,
    baseline: NDArray[np.float64],
    candidate: NDArray[np.float64],
    *,
    group: str | None = None,
    mixed: float | None = None,
    main: bool = False,
) -> Metric:
    """A metric that is a mean over rows, with the interval of the paired mean difference."""
    interval = bootstrap.of_mean(candidate - baseline)
    return Metric(name, float(baseline.mean()), float(candidate.mean()), interval, len(baseline), group, mixed, main)


def _through_ivf(
    exact: Rankings,
    candidate: tuple[NDArray[np.float32], NDArray[np.float32]],
    baseline: tuple[NDArray[np.float32], NDArray[np.float32]],
    relevant: Relevant,
    own: Lists | None,
) -> list[Metric]:
    depth = min(10, exact.baseline.shape[1])
    lists = []
    for queries, passages in (baseline, candidate):
        wider = through_ivf(queries, passages, min(depth + (own is not None), len(passages)))
        lists.append(wider if own is None else without(wider, own, depth))
    overlaps = [
        neighbours.shared(retrieved, best[:, :depth], depth)
        for retrieved, best in zip(lists, (exact.baseline, exact.candidate), strict=True)
    ]
    return [
        _metric("nDCG@10, IVF", _gains(Rankings(*lists), relevant), relevant, ranking.ndcg, 10),
        paired("IVF vs exact@10", *overlaps),
    ]


def _across_languages(
    collection: Collection,
    candidate: tuple[NDArray[np.float32], NDArray[np.float32]],
    baseline: tuple[NDArray[np.float32], NDArray[np.float32]],
    own: Lists | None,
) -> list[Metric]:
    """nDCG@10 for each pair of languages, among the passages of one language; empty if there is only one pair."""
    query_languages = [text.language for text in collection.queries]
    passage_languages = [text.language for text in collection.passages]
    pairs = sorted(
        {
            (query_languages[query], passage_languages[row])
            for query, grades in enumerate(collection.relevant)
            for row in grades
            if query_languages[query] and passage_languages[row]
        },
        key=lambda pair: (pair[0] != pair[1], pair),
    )
    if len(pairs) < 2:
        return []
    metrics = []
    for language, passage_language in pairs:
        rows = np.flatnonzero([other == passage_language for other in passage_languages])
        place = {int(row): position for position, row in enumerate(rows)}
        grades = [{place[row]: grade for row, grade in of_query.items() if row in place} for of_query in collection.relevant]
        queries = [query for query, of_query in enumerate(grades) if of_query and query_languages[query] == language]
        depth = min(10, len(rows))
        index = candidate[1][rows], baseline[1][rows]
        here = None if own is None else np.array([place.get(int(own[query]), -1) for query in queries], np.intp)
        retrieved = Rankings(
            baseline=_search(baseline[0][queries], index[1], depth, here),
            candidate=_search(candidate[0][queries], index[0], depth, here),
            mixed=_search(candidate[0][queries], index[1], depth, here),
        )
        relevant = [grades[query] for query in queries]
        group = f"{language} → {passage_language}"
        metrics.append(_metric("nDCG@10", _gains(retrieved, relevant), relevant, ranking.ndcg, 10, group=group))
    return metrics


def _reranked(collection: Collection, rankings: Rankings, rerank: Rerank) -> Metric:
    """nDCG@10 after the reranker has sorted the best RERANKED of each side."""
    assert rankings.mixed is not None
    tops = {name: getattr(rankings, name)[:, :RERANKED] for name in ("baseline", "candidate", "mixed")}
    pairs = sorted(
        {(query, int(row)) for lists in tops.values() for query, rows in enumerate(lists) for row in rows if row >= 0}
    )
    texts = [text.text for text in collection.queries], [text.text for text in collection.passages]
    scores = dict(zip(pairs, rerank(*texts, pairs), strict=True))
    ordered = {name: _by_score(lists, scores) for name, lists in tops.items()}
    return _metric("nDCG@10, reranked", _gains(Rankings(**ordered), collection.relevant), collection.relevant, ranking.ndcg, 10)


def _by_score(lists: Lists, scores: Mapping[tuple[int, int], float]) -> Lists:
    """Each row of `lists` [q, k] by descending score; ties, and entries without a score at the end, keep their order."""
    ordered = [
        sorted(rows.tolist(), key=lambda row, query=query: -scores.get((query, row), -np.inf))  # type: ignore[misc]
        for query, rows in enumerate(lists)
    ]
    return np.array(ordered, np.intp).reshape(lists.shape)
