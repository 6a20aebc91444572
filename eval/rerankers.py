"""`qembed eval --task rerank`: an INT4 reranker against its original, by the scores that both give the same pairs.

For each query the pairs are its relevant passages and others drawn at random, so that no first stage is needed. What counts
is how far scores differ, whether the passages of a query keep their order, and what that does to nDCG@10.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed import bootstrap, rerank
from qembed.checkpoint.find import find, find_int4, source_of
from qembed.errors import BadInput
from qembed.eval import result
from qembed.eval.tasks import ranking
from qembed.eval.tasks.retrieval import Collection, paired
from qembed.eval.thresholds import Thresholds, judged, verdict
from qembed.text.cleaning import clean
from qembed.vllm import api_keys

if TYPE_CHECKING:
    from rich.console import Console

TASK = "rerank"
PASSAGES = 10
"""Passages that are scored for each query."""
SEED = 0
FOR_VECTORS = (
    *("vectors", "baseline_vectors", "data", "text_column", "id_column", "classification", "sts", "rerank", "min_cosine"),
    *("min_p1", "report", "card"),
)
"""Options that mean nothing where no vectors are compared."""

Pairs = Sequence[tuple[int, int]]
"""A query's and a passage's row each."""
Scores = NDArray[np.float64]


def check(options: Mapping[str, Any]) -> None:
    """Refuse options that do not go with `--task rerank`.

    Raises:
        BadInput: there is one.
    """
    if other := next((name for name in options["task"] if name != TASK), None):
        raise BadInput(f"--task {TASK} compares rerankers, --task {other} vectors; run them one after the other")
    if name := next((name for name in FOR_VECTORS if options[name]), None):
        raise BadInput(f"--task {TASK} compares scores; leave --{name.replace('_', '-')} out")
    for name, url in (("engine", "url"), ("baseline_engine", "baseline_url")):
        if options[name] == "vllm":
            option = name.replace("_", "-")
            raise BadInput(f"--{option} vllm: start the reranker with qembed serve, and name it with --{url.replace('_', '-')}")
    if options["baseline"] == "fp32":
        raise BadInput(f"--task {TASK} computes the original as published; leave --baseline fp32 out")


def sides(options: Mapping[str, Any]) -> tuple[rerank.Reranker, rerank.Reranker]:
    """Candidate and baseline: running servers, or checkpoints through transformers.

    Raises:
        BadInput: one is missing, or no reranker.
    """
    key = api_keys.first(options["api_key_file"])
    if options["url"]:
        candidate = rerank.through_server(options["url"], key)
    else:
        candidate = rerank.through_transformers(find_int4(options["model"]))
    if options["baseline_url"]:
        return candidate, rerank.through_server(options["baseline_url"], key)
    original = find(options["baseline_model"] or source_of(find_int4(options["model"])))
    if original.is_int4:
        raise BadInput(f"{original.folder}: an INT4 checkpoint; the baseline is the original that it was made from")
    return candidate, rerank.through_transformers(original)


def pairs_of(collection: Collection) -> list[tuple[int, int]]:
    """PASSAGES pairs of each query: with its relevant passages, at most half of them, and with others drawn at random.

    A passage with the query's own id is left out, as in the task retrieval.
    """
    draw, count = random.Random(SEED), len(collection.passages)
    pairs: list[tuple[int, int]] = []
    for query, grades in enumerate(collection.relevant):
        relevant = sorted(grades, key=lambda row, grades=grades: (-grades[row], row))[: PASSAGES // 2]  # type: ignore[misc]
        drawn = draw.sample(range(count), min(count, PASSAGES + len(grades) + 1))
        name = collection.queries[query].id
        others = [row for row in drawn if row not in grades and collection.passages[row].id != name]
        pairs += [(query, row) for row in (*relevant, *others[: PASSAGES - len(relevant)])]
    return pairs


def compare(
    candidate: rerank.Reranker,
    baseline: rerank.Reranker,
    collection: Collection,
    instruction: str | None,
    thresholds: Thresholds,
    cache: Path | None,
    progress: Console,
) -> dict[str, Any]:
    """The result of `candidate` against `baseline` on the queries and passages of `collection` (JSON types).

    Raises:
        QembedError: a side fails.
    """
    pairs = pairs_of(collection)
    queries, passages = ([clean(text.text) for text in texts] for texts in (collection.queries, collection.passages))
    int4, original = (
        rerank.scoring(side, instruction, cache, progress)(queries, passages, pairs) for side in (candidate, baseline)
    )
    task = _task(collection, pairs, int4, original)
    empty = {"vectors": {}, "overall": {"mean": None, "p1": None}}
    return {
        **{name: value for name, value in result.surroundings().items() if name != "schema"},
        "task": TASK,
        "candidate": {"model": candidate.name},
        "baseline": {"model": baseline.name},
        "pairs": len(pairs),
        "scores": _scores(pairs, int4, original),
        "tasks": [task],
        "gate": [record.record() for record in judged([task], thresholds)],
        "settings": asdict(thresholds),
        "verdict": verdict(empty, [task], thresholds),
    }


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The result for people."""
    scores, (task,) = record["scores"], record["tasks"]
    (ndcg,) = task["metrics"]
    difference, order = scores["difference"], scores["kendall_tau"]
    yield f"candidate: {record['candidate']['model']}"
    yield f"baseline:  {record['baseline']['model']}"
    yield f"pairs:     {record['pairs']:,} of {ndcg['count']:,} queries ({task['data']['name']})"
    yield (
        f"difference of scores: mean {difference['mean']:.4f}{_interval(difference['interval'])}, "
        f"99th percentile {difference['p99']:.4f}, maximum {difference['maximum']:.4f}"
    )
    if order["mean"] is not None:
        yield f"order of a query's passages, Kendall's τ: {order['mean']:.4f}{_interval(order['interval'])}"
    yield (
        f"nDCG@10: {ndcg['candidate']:.4f}, of the baseline {ndcg['baseline']:.4f}, "
        f"difference {ndcg['difference']:+.4f}{_interval(ndcg['interval'])}"
    )


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" (95% {interval[0]:.4f} to {interval[1]:.4f})"


def _scores(pairs: Pairs, candidate: Scores, baseline: Scores) -> dict[str, Any]:
    """How far scores differ, and how much of the order of each query's passages is kept."""
    differences = np.abs(candidate - baseline)
    taus = np.array([tau for rows in _by_query(pairs) if (tau := kendall_tau(baseline[rows], candidate[rows])) is not None])
    return {
        "difference": {
            "mean": float(differences.mean()),
            "interval": bootstrap.of_mean(differences),
            "p99": float(np.quantile(differences, 0.99)),
            "maximum": float(differences.max()),
        },
        "kendall_tau": {
            "mean": float(taus.mean()) if len(taus) else None,
            "interval": bootstrap.of_mean(taus) if len(taus) else None,
        },
    }


def kendall_tau(baseline: Scores, candidate: Scores) -> float | None:
    """Of two scores each that `baseline` tells apart: the share in its order less the share in the other order.

    None if it tells none apart.
    """
    upper = np.triu_indices(len(baseline), 1)
    wanted, actual = (np.sign(scores[:, None] - scores)[upper] for scores in (baseline, candidate))
    return float((wanted * actual).sum() / np.abs(wanted).sum()) if wanted.any() else None


def _task(collection: Collection, pairs: Pairs, candidate: Scores, baseline: Scores) -> dict[str, Any]:
    """nDCG@10 of both sides as the record of a task."""
    grades = [list(of_query.values()) for of_query in collection.relevant]
    sides = []
    for scores in (baseline, candidate):
        lists = np.full((len(grades), PASSAGES), -1, np.intp)
        for query, rows in enumerate(_by_query(pairs)):
            best = rows[np.argsort(-scores[rows], kind="stable")]
            lists[query, : len(best)] = [pairs[row][1] for row in best]
        ideal = [sorted(of_query, reverse=True)[: PASSAGES // 2] for of_query in grades]  # as many as are scored
        sides.append(ranking.ndcg(ranking.gains(lists, collection.relevant), ideal, 10))
    data = {"name": collection.name, "sha256": collection.sha256, "queries": len(grades), "passages": len(collection.passages)}
    return {
        "task": TASK,
        "data": data,
        "settings": {"passages": PASSAGES, "seed": SEED},
        "notes": list(collection.notes),
        "metrics": [paired("nDCG@10", *sides, main=True).record()],
    }


def _by_query(pairs: Pairs) -> list[NDArray[np.intp]]:
    """The positions of each query's pairs; those of a query are consecutive."""
    queries = np.array([query for query, _ in pairs])
    return np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(queries)) + 1)
