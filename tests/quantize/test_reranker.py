"""`qembed quantize` of a Qwen3-Reranker: pairs in its template, scores measured, and a folder that says what it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from qembed import rerank
from qembed.checkpoint.find import find
from qembed.checkpoint.reranker import AFTER, BEFORE
from qembed.cli import group
from qembed.errors import BadInput
from qembed.eval import rerankers
from qembed.eval.readers import builtin
from qembed.eval.thresholds import Thresholds
from qembed.quantize import calibration_pairs
from qembed.quantize.calibration_pairs import Pair, Pairs, prepare
from qembed.quantize.manifest import fidelity_record
from qembed.quantize.settings import Report
from tests.test_rerank import PAIRS

from .conftest import assert_refused, quantize

LONG = Pair("long", "why", "b" * 1000)


def pairs_of(*pairs: Pair) -> Pairs:
    return Pairs(list(pairs), "file", "0")


def prepared(folder: Path, pairs: Pairs, **settings: Any) -> Any:
    return prepare(pairs, find(str(folder)), **{"max_tokens": 200, "check": 0, "seed": 0, **settings})


def text_of(folder: Path, ids: list[int]) -> str:
    return str(find(str(folder)).tokenizer().decode(ids, skip_special_tokens=False))


def test_rows_are_pairs_in_the_whole_template(reranker: Path) -> None:
    pairs = pairs_of(Pair("a", "why\u200b", "because", "judge"), LONG, Pair("b", "q" * 300, "x" * 100))
    rows = [text_of(reranker, row) for row in prepared(reranker, pairs).rows]
    assert rows[0] == f"{BEFORE}<Instruct>: judge\n<Query>: why\n<Document>: because{AFTER}"
    assert all(row.startswith(BEFORE) and row.endswith(AFTER) for row in rows)
    tokenizer = find(str(reranker)).tokenizer()
    lengths = [len(tokenizer.encode(row.removeprefix(BEFORE).removesuffix(AFTER)).ids) for row in rows]
    assert lengths[1] == 200
    assert f"<Query>: {'q' * 300}\n<Document>: xxx" in rows[2]  # a long query is not cut, and some document is left


def test_documents_alone_are_shortened_to_the_budget(reranker: Path) -> None:
    pairs = pairs_of(*(Pair(str(number), "why", "b" * 150) for number in range(16)))
    calibration = prepared(reranker, pairs, token_budget=16 * 150)
    assert calibration.shortened == 12  # one in four keeps its length
    rows = [text_of(reranker, list(row)) for row in calibration.rows]
    assert all("<Query>: why\n<Document>: bbb" in row and row.endswith(AFTER) for row in rows)


def test_the_pairs_of_a_query_are_held_out_together(reranker: Path) -> None:
    pairs = calibration_pairs.built_in()
    calibration = prepared(reranker, pairs, check=30)
    held_out = {pairs.pairs[number].query for number in calibration.check}
    assert (len(calibration.check), len(held_out)) == (30, 5)
    again = prepared(reranker, pairs, check=30)
    assert again.check == calibration.check != prepared(reranker, pairs, check=30, seed=1).check
    assert [len(set(calibration.queries)), len(calibration.queries)] == [len(pairs) // 6, len(pairs)]


def test_built_in_pairs_are_several_documents_for_each_query() -> None:
    pairs = calibration_pairs.built_in().pairs
    rows = [json.loads(line) for line in calibration_pairs.BUILT_IN.read_text().splitlines()]
    assert len({row["query"] for row in rows}) == len(rows) == len(pairs) / 6
    assert len({row["language"] for row in rows}) > 15
    assert {row["relevant"] for row in rows}.isdisjoint(row["negative"] for row in rows)
    assert all(pair.document.strip() and pair.query.strip() for pair in pairs)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "one\n" * 99, "plain text has no columns"),
        ("a.csv", "query,text\n" + "q,d\n" * 99, "document"),
        ("a.jsonl", '{"query": "q", "document": " "}\n' * 99, "line 1: no document"),
        ("a.csv", "query,document\n" + "q,d\n" * 9, "9 pairs, at least 64"),
    ],
)
def test_a_file_without_pairs_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=words):
        calibration_pairs.read(str(tmp_path / name), 100, 0)


def test_a_query_that_leaves_no_room_is_refused(reranker: Path) -> None:
    with pytest.raises(BadInput, match="a: the query leaves no room"):
        prepared(reranker, pairs_of(Pair("a", "q" * 5000, "d")))


def test_differences_and_order_of_scores_are_recorded() -> None:
    report = Report(cosines=[1.0] * 5, queries=[0, 0, 0, 1, 1])
    report.scores = [(0.9, 0.8), (0.5, 0.6), (0.1, 0.7), (0.3, 0.3), (0.3, 0.9)]
    record = fidelity_record(report)
    assert record["mean_score_difference"] == pytest.approx((0.1 + 0.1 + 0.6 + 0 + 0.6) / 5)
    assert record["max_score_difference"] == pytest.approx(0.6)
    assert record["kendall_tau"] == pytest.approx(
        1 / 3, abs=1e-6
    )  # of three pairs one is turned round; equal scores tell nothing
    assert "kendall_tau" not in fidelity_record(Report(cosines=[1.0]))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["original", "converted"])
def test_a_quantized_reranker_is_one_and_scores_alike(
    form: str, reranker: Path, converted_reranker: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "model", tmp_path / "int4"  # no name says that it is a reranker
    shutil.copytree(reranker if form == "original" else converted_reranker, source)
    options = ["--task", "rerank"] if form == "original" else []
    result = quantize("--model", source, "-o", target, *options, "--json")
    assert result.exit_code == 0, result.output
    report, checkpoint = json.loads(result.stdout), find(str(target))
    assert report["task"] == checkpoint.manifest["task"] == "rerank"
    assert checkpoint.is_int4
    assert checkpoint.reranker is not None
    assert checkpoint.reranker.form == form
    assert checkpoint.config["quantization_config"]["modules_to_not_convert"] == (["score"] if form == "converted" else None)
    assert {"mean_score_difference", "max_score_difference", "kendall_tau"} < checkpoint.manifest["fidelity"].keys()
    card = (target / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card
    assert "/v1/rerank" in card
    assert "A vector is" not in card
    assert "SmolLM2" not in card  # whose numbers are of vectors
    assert ("classifier_from_token" in card) is (form == "original")
    scores = []
    for folder in (source, target):
        with rerank.through_transformers(replace(find(str(folder)), task="rerank")).open() as score:
            scores.append(score(PAIRS, None))
    assert np.abs(scores[0] - scores[1]).max() < 0.2
    verified = quantize_verify(target)
    assert verified["findings"] == []
    assert verified["fidelity"]["min_cosine"] >= checkpoint.manifest["fidelity"]["min_cosine"] - 0.01


def quantize_verify(folder: Path) -> dict[str, Any]:
    result = CliRunner().invoke(group, ["quantize", "--verify", str(folder), "--json"])
    assert result.exit_code in (0, 1), result.output
    verified: dict[str, Any] = json.loads(result.stdout)
    return verified


@pytest.mark.slow
def test_calibration_on_pairs_keeps_scores_nearer_than_on_texts(reranker: Path, tmp_path: Path) -> None:
    """What `eval --task rerank` measures; 0.012 and 0.030 with all built-in texts."""
    collection = builtin.retrieval()
    few = replace(collection, queries=collection.queries[::4], relevant=collection.relevant[::4])
    difference = {}
    for task in ("rerank", "embed"):
        target = tmp_path / task
        result = quantize(
            "--model", reranker, "-o", target, "--task", task, "--max-tokens", "200", "--calibration-texts", "128"
        )
        assert result.exit_code == 0, result.output
        sides = (rerank.through_transformers(find(str(folder))) for folder in (target, reranker))
        record = rerankers.compare(*sides, few, None, Thresholds(), None, Console(quiet=True))
        difference[task] = record["scores"]["difference"]["mean"]
    assert difference["rerank"] < 0.7 * difference["embed"]


@pytest.mark.slow
def test_pairs_of_the_user_calibrate_a_reranker(reranker: Path, tmp_path: Path) -> None:
    rows = [{"query": f"q{number % 10}", "passage": f"text {number}"} for number in range(80)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    target = tmp_path / "out"
    result = quantize("--model", reranker, "-o", target, "--calibration", f"{tmp_path / 'mine.jsonl'}:passage")
    assert result.exit_code == 0, result.output
    manifest = find(str(target)).manifest
    assert (manifest["calibration"]["source"], manifest["fidelity"]["texts"]) == ("mine.jsonl", 10)
    assert "difference of scores" in result.stdout
    assert f"qembed eval --task rerank --model {target}" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--token-table", "int8"], "--token-table int8"), (["--prefixes", "4"], "--prefixes 4")],
)
def test_settings_that_a_reranker_cannot_have_are_refused(
    reranker: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert_refused(quantize("--model", reranker, "-o", tmp_path / "out", *options), words)


def test_a_reranker_makes_no_vectors(reranker: Path) -> None:
    with pytest.raises(BadInput, match="a reranker, which scores pairs"):
        _ = find(str(reranker)).embedder
