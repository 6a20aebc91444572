"""Cached vectors are not recomputed, and never used for another text, model or setting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from qembed.cli import group
from qembed.errors import BadInput, QembedError
from qembed.eval import arrays, embedding
from qembed.eval.embedding import Embedder
from qembed.vectors import cache, sources
from tests.eval.conftest import FakeServer

pytestmark = pytest.mark.slow

Start = Callable[[], FakeServer]
TEXTS = [f"text {number}" for number in range(10)]
QUIET = Console(quiet=True)


def vectors_of(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), sum(text.encode()), 1] for text in texts], np.float32)


class CountingSide:
    """A side that counts how often it is opened and records the texts that it computes."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.texts_computed: list[str] = []
        self.times_opened = 0
        self.fails_at = fails_at

    def embed(self, texts: Any, on_done: Any) -> np.ndarray:
        if self.fails_at in texts:
            raise QembedError("the engine is dead")
        self.texts_computed += texts
        on_done(len(texts))
        return vectors_of(list(texts))

    def side(self, **identity: Any) -> sources.Side:
        def open_source(_: Any) -> Any:
            self.times_opened += 1
            return nullcontext(sources.Source("vllm", "m", "awq-int4", "cpu", "float32", None, 99, self.embed, "1.0"))

        return sources.Side(99, open_source, identity)


def embed_through(
    counting: CountingSide, folder: Path | None, texts: list[str], **identity: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    with Embedder(counting.side(**identity), "candidate", folder, QUIET) as embedder:
        return embedder.vectors(texts, "texts"), embedder.description()


def test_a_second_run_opens_no_engine_and_has_the_same_description(tmp_path: Path) -> None:
    first, second = CountingSide(), CountingSide()
    vectors, expected = embed_through(first, tmp_path, TEXTS)
    assert np.array_equal(vectors, vectors_of(TEXTS))
    assert (expected["computed"], expected["from_cache"]) == (10, 0)
    again, repeated_description = embed_through(second, tmp_path, TEXTS[::-1])
    assert np.array_equal(again, vectors_of(TEXTS[::-1]))
    assert second.times_opened == 0
    assert repeated_description == {**expected, "computed": 0, "from_cache": 10, "seconds": 0.0}


def test_only_missing_texts_are_computed_and_repeated_ones_once(tmp_path: Path) -> None:
    embed_through(CountingSide(), tmp_path, TEXTS[:6])
    counting = CountingSide()
    vectors, _ = embed_through(counting, tmp_path, [*TEXTS, TEXTS[9], TEXTS[0]])
    assert sorted(counting.texts_computed) == TEXTS[6:]
    assert np.array_equal(vectors, vectors_of([*TEXTS, TEXTS[9], TEXTS[0]]))


def test_vectors_of_other_settings_are_not_used(tmp_path: Path) -> None:
    embed_through(CountingSide(), tmp_path, TEXTS, dtype="float32")
    counting = CountingSide()
    embed_through(counting, tmp_path, TEXTS, dtype="bfloat16")
    assert sorted(counting.texts_computed) == TEXTS


def test_without_a_folder_nothing_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    embed_through(CountingSide(), None, TEXTS)
    counting = CountingSide()
    embed_through(counting, None, TEXTS)
    assert sorted(counting.texts_computed) == TEXTS
    assert list(tmp_path.iterdir()) == []


def test_vectors_computed_before_a_failure_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "CHUNK", 2)
    with pytest.raises(QembedError, match=r"the engine is dead \(4 of 10 vectors are in the cache .*: run the same command"):
        embed_through(CountingSide(fails_at="text 5"), tmp_path, TEXTS)
    counting = CountingSide()
    embed_through(counting, tmp_path, TEXTS)
    assert sorted(counting.texts_computed) == TEXTS[4:]


def test_large_arrays_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAPPED_BYTES", 50)
    vectors, _ = embed_through(CountingSide(), tmp_path, TEXTS)
    assert isinstance(vectors, np.memmap)
    assert np.array_equal(vectors, vectors_of(TEXTS))
    assert [path.suffix for path in tmp_path.iterdir()] == [".sqlite"]


def test_a_damaged_cache_and_an_unusable_folder_are_refused(tmp_path: Path) -> None:
    embed_through(CountingSide(), tmp_path, TEXTS)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"no database at all, and long enough to be looked at" * 50)
    with pytest.raises(BadInput, match=r"a damaged cache .*; delete it"):
        embed_through(CountingSide(), tmp_path, TEXTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="no place for a cache"):
        embed_through(CountingSide(), tmp_path / "file", TEXTS)


def test_a_changed_checkpoint_has_another_identity(int4: Path, tmp_path: Path) -> None:
    from qembed.checkpoint.find import find

    copy = tmp_path / "copy"
    shutil.copytree(int4, copy)
    before = sources.transformers(find(str(copy))).identity
    assert sources.transformers(find(str(copy))).identity == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert sources.transformers(find(str(copy))).identity != before


def qembed(candidate: FakeServer, baseline: FakeServer, *more: object) -> Result:
    servers = ("--url", candidate.url, "--baseline-url", baseline.url)
    return CliRunner().invoke(group, ["eval", *map(str, servers), *map(str, more)])


def test_after_a_servers_failure_the_next_run_continues(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "CHUNK", 16)
    candidate, baseline = start_server(), start_server()
    baseline.dies_after = 100
    result = qembed(candidate, baseline)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"qembed: {baseline.url}")
    assert "the engine is dead" in last
    assert "112 of 288 vectors are in the cache" in last
    assert "Traceback" not in result.output
    baseline.dies_after = None
    requests = len(candidate.inputs)
    result = qembed(candidate, baseline, "--json")
    assert result.exit_code == 0, result.stderr
    assert len(candidate.inputs) == requests == 288
    assert len(set(baseline.inputs)) == len(baseline.inputs) == 288
    report = json.loads(result.stdout)
    assert (report["candidate"]["from_cache"], report["baseline"]["from_cache"], report["baseline"]["computed"]) == (
        288,
        112,
        176,
    )


def test_vectors_of_a_server_that_now_serves_another_model_are_recomputed(start_server: Start) -> None:
    candidate, baseline = start_server(), start_server()
    first = json.loads(qembed(candidate, baseline, "--json").stdout)
    candidate.noise = 0.1
    again = qembed(candidate, baseline, "--json")
    assert "returns other vectors than before" in again.stderr
    report = json.loads(again.stdout)
    assert report["candidate"]["from_cache"] == 0
    assert report["baseline"]["from_cache"] == 288
    assert first["results"]["overall"]["mean"] == pytest.approx(1)
    assert report["results"]["overall"]["mean"] < 0.999


def test_an_unwritable_default_cache_is_a_warning_and_an_unwritable_chosen_one_an_error(
    start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("QEMBED_EVAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = qembed(start_server(), start_server())
    assert result.exit_code == 0, result.stderr
    assert "vectors are not cached: the cache folder cannot be written" in " ".join(result.stderr.split())
    chosen = qembed(start_server(), start_server(), "--cache", tmp_path / "file")
    assert chosen.exit_code == 2
    assert "is a file" in chosen.stderr


def test_with_no_cache_every_run_sends_all_texts(start_server: Start, cache_folder: Path) -> None:
    candidate, baseline = start_server(), start_server()
    for _ in range(2):
        assert qembed(candidate, baseline, "--no-cache").exit_code == 0
    assert len(candidate.inputs) == 576
    assert not cache_folder.exists()


def test_digests_of_texts_differ() -> None:
    assert cache.digest("a") != cache.digest("b")
    assert len(cache.digest("ü")) == 16
