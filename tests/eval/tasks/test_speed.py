"""Speed: the order of requests, and the numbers computed from their durations. No test depends on real time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from qembed.checkpoint.description import Checkpoint
from qembed.cli import group
from qembed.client import about
from qembed.errors import BadInput
from qembed.eval.tasks import speed
from qembed.eval.tasks.speed import RequestShape
from tests.eval.conftest import FakeServer

POOL = [f"word{number}" for number in range(50)]


def test_both_sides_warm_up_and_then_alternate_with_the_same_texts() -> None:
    calls: list[tuple[str, tuple[str, ...]]] = []
    sends = {name: lambda batch, name=name: calls.append((name, tuple(batch))) for name in ("candidate", "baseline")}
    seconds = speed.rounds(RequestShape(2, 5), sends, POOL, None)  # type: ignore[arg-type]
    assert len(seconds["candidate"]) == len(seconds["baseline"]) == speed.MOST
    assert [name for name, _ in calls[:6]] == ["candidate", "baseline", "candidate", "baseline", "baseline", "candidate"]
    pairs = [calls[index : index + 2] for index in range(0, len(calls), 2)]
    assert all(first[1] == second[1] for first, second in pairs)
    batch_texts = [text for pair in pairs for text in pair[0][1]]
    assert len(set(batch_texts)) == len(batch_texts)
    assert {len(text.split()) for text in batch_texts} == {5}


def test_rates_and_ratios_by_hand() -> None:
    seconds = {"candidate": [0.1, 0.2, 0.3], "baseline": [0.2, 0.2, 0.9]}
    entry = speed.record(RequestShape(4, 10), seconds)
    assert entry["candidate"] == pytest.approx(
        {"texts_per_second": 20, "tokens_per_second": 200, "p50": 0.2, "p99": np.percentile([0.1, 0.2, 0.3], 99)}
    )
    assert entry["baseline"]["texts_per_second"] == pytest.approx(20)
    # In the three rounds the candidate is 2, 1 and 3 times as fast.
    assert entry["ratio"] == pytest.approx(2)
    assert (entry["low"], entry["high"]) == pytest.approx((1.1, 2.9))
    assert entry["requests"] == 3


def test_texts_have_the_requested_length(fp16: Path) -> None:
    tokenizer = Checkpoint("tiny", fp16).tokenizer()
    batch = speed.texts(RequestShape(3, 40), POOL, tokenizer, 7)
    assert [len(tokenizer.encode(text).ids) for text in batch] == [40] * 3
    assert len(set(batch)) == 3


def test_shapes_that_are_too_long_are_left_out_with_a_note() -> None:
    shapes, notes = speed.shapes([1, 32], [16, 512, 2048], 1024)
    assert shapes == [RequestShape(1, 16), RequestShape(32, 16), RequestShape(1, 512)]
    assert notes == ["lengths over the context of 1024 tokens are left out", "requests of more than 4096 tokens are left out"]
    with pytest.raises(BadInput, match="all are over the context of 8 tokens"):
        speed.shapes([1], [16], 8)


def run(start_server: Callable[[], FakeServer], tmp_path: Path, *more: object) -> Result:
    (tmp_path / "few.txt").write_text("one two three\nfour five\nsix\n")
    servers = ("--url", start_server().url, "--baseline-url", start_server().url)
    return CliRunner().invoke(group, ["eval", *map(str, (*servers, "--data", tmp_path / "few.txt", "--task", "speed", *more))])


def test_two_servers_are_measured(
    start_server: Callable[[], FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MOST", 6)
    result = run(start_server, tmp_path, "--speed-batches", "1,4", "--speed-lengths", "3", "--json")
    assert result.exit_code == 0, result.stderr
    speeds = json.loads(result.stdout)["speed"]
    assert [(shape["batch"], shape["tokens"], shape["requests"]) for shape in speeds["shapes"]] == [(1, 3, 6), (4, 3, 6)]
    assert all(shape["low"] <= shape["ratio"] <= shape["high"] for shape in speeds["shapes"])
    assert speeds["candidate"]["memory"] is None
    output = run(start_server, tmp_path, "--speed-batches", "1", "--speed-lengths", "3").stdout
    assert "Speed: both sides answer the same requests in turn" in output
    assert "memory –" in output


@pytest.mark.parametrize("sizes", ["0", "a", "1,,2", "-1", "1.5", ""])
def test_invalid_batch_sizes_are_refused(start_server: Callable[[], FakeServer], tmp_path: Path, sizes: str) -> None:
    result = run(start_server, tmp_path, "--speed-batches", sizes)
    assert result.exit_code == 2
    assert "--speed-batches" in result.stderr.splitlines()[-1]


def test_memory_is_read_from_the_metrics_of_a_qembed_server(start_server: Callable[[], FakeServer]) -> None:
    server = start_server()
    assert about.memory(server.url) is None
    server.about = {"dtype": "float16"}
    assert about.memory(server.url + "/v1") == 1_234_500_000


SIDE = {"engine": "vllm", "version": "1", "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(
    ("other", "notes_expected"),
    [
        ({}, []),
        ({"dtype": "bfloat16"}, ["the two sides computed in float32 and in bfloat16"]),
        ({"dtype": None}, ["the dtype of a side is not known"]),
        ({"device": "cuda"}, ["the two sides computed on cpu and on cuda"]),
        ({"engine": "server", "version": "2"}, ["the two sides ran through different engines (vllm, server)"]),
        ({"version": "2"}, ["the two sides ran through different versions (1, 2)"]),
    ],
)
def test_differences_between_the_sides_other_than_weights_are_noted(other: dict[str, str], notes_expected: list[str]) -> None:
    notes = list(speed.unlike(SIDE, SIDE | other))
    assert len(notes) == len(notes_expected)
    assert all(note.startswith(words) for note, words in zip(notes, notes_expected, strict=True))
