"""Vectors that were computed are not computed again, and none is ever taken for another's."""

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


class Counted:
    """A side that counts how often it is opened, and what it is asked."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.asked: list[str] = []
        self.opened = 0
        self.fails_at = fails_at

    def embed(self, texts: Any, on_done: Any) -> np.ndarray:
        if self.fails_at in texts:
            raise QembedError("the engine is dead")
        self.asked += texts
        on_done(len(texts))
        return vectors_of(list(texts))

    def side(self, **identity: Any) -> sources.Side:
        def opened(_: Any) -> Any:
            self.opened += 1
            return nullcontext(sources.Source("vllm", "m", "awq-int4", "cpu", "float32", None, 99, self.embed, "1.0"))

        return sources.Side(99, opened, identity)


def embedded(counted: Counted, folder: Path | None, texts: list[str], **identity: Any) -> tuple[np.ndarray, dict[str, Any]]:
    with Embedder(counted.side(**identity), "candidate", folder, QUIET) as embedder:
        return embedder.vectors(texts, "texts"), embedder.description()


def test_a_second_run_opens_nothing_and_tells_the_same(tmp_path: Path) -> None:
    first, second = Counted(), Counted()
    vectors, expected = embedded(first, tmp_path, TEXTS)
    assert np.array_equal(vectors, vectors_of(TEXTS))
    assert (expected["computed"], expected["from_cache"]) == (10, 0)
    again, told_again = embedded(second, tmp_path, TEXTS[::-1])
    assert np.array_equal(again, vectors_of(TEXTS[::-1]))
    assert second.opened == 0
    assert told_again == {**expected, "computed": 0, "from_cache": 10, "seconds": 0.0}


def test_only_what_is_missing_is_computed_and_the_same_text_once(tmp_path: Path) -> None:
    embedded(Counted(), tmp_path, TEXTS[:6])
    counted = Counted()
    vectors, _ = embedded(counted, tmp_path, [*TEXTS, TEXTS[9], TEXTS[0]])
    assert sorted(counted.asked) == TEXTS[6:]
    assert np.array_equal(vectors, vectors_of([*TEXTS, TEXTS[9], TEXTS[0]]))


def test_other_settings_are_other_vectors(tmp_path: Path) -> None:
    embedded(Counted(), tmp_path, TEXTS, dtype="float32")
    counted = Counted()
    embedded(counted, tmp_path, TEXTS, dtype="bfloat16")
    assert sorted(counted.asked) == TEXTS


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    embedded(Counted(), None, TEXTS)
    counted = Counted()
    embedded(counted, None, TEXTS)
    assert sorted(counted.asked) == TEXTS
    assert list(tmp_path.iterdir()) == []


def test_what_was_computed_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "CHUNK", 2)
    with pytest.raises(QembedError, match=r"the engine is dead \(4 of 10 vectors are in the cache .*: run the same command"):
        embedded(Counted(fails_at="text 5"), tmp_path, TEXTS)
    counted = Counted()
    embedded(counted, tmp_path, TEXTS)
    assert sorted(counted.asked) == TEXTS[4:]


def test_large_arrays_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAPPED_BYTES", 50)
    vectors, _ = embedded(Counted(), tmp_path, TEXTS)
    assert isinstance(vectors, np.memmap)
    assert np.array_equal(vectors, vectors_of(TEXTS))
    assert [path.suffix for path in tmp_path.iterdir()] == [".sqlite"]


def test_a_damaged_cache_and_a_place_without_one_are_named(tmp_path: Path) -> None:
    embedded(Counted(), tmp_path, TEXTS)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"no database at all, and long enough to be looked at" * 50)
    with pytest.raises(BadInput, match=r"a damaged cache .*; delete it"):
        embedded(Counted(), tmp_path, TEXTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="no place for a cache"):
        embedded(Counted(), tmp_path / "file", TEXTS)


def test_a_checkpoint_that_changed_is_another_one(int4: Path, tmp_path: Path) -> None:
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


def test_a_server_that_dies_half_way_loses_nothing(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
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
    completed = qembed(candidate, baseline, "--json")
    assert completed.exit_code == 0, completed.stderr
    assert len(candidate.inputs) == requests == 288
    assert len(set(baseline.inputs)) == len(baseline.inputs) == 288
    report = json.loads(completed.stdout)
    assert (report["candidate"]["from_cache"], report["baseline"]["from_cache"], report["baseline"]["computed"]) == (
        288,
        112,
        176,
    )


def test_a_server_that_serves_another_model_now_is_asked_anew(start_server: Start) -> None:
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


def test_a_home_that_cannot_be_written_is_told_and_no_hindrance(
    start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("QEMBED_EVAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = qembed(start_server(), start_server())
    assert result.exit_code == 0, result.stderr
    assert "vectors are not cached: the cache folder cannot be written" in " ".join(result.stderr.split())
    requests = qembed(start_server(), start_server(), "--cache", tmp_path / "file")
    assert requests.exit_code == 2
    assert "is a file" in requests.stderr


def test_no_cache_asks_every_time(start_server: Start, cache_folder: Path) -> None:
    candidate, baseline = start_server(), start_server()
    for _ in range(2):
        assert qembed(candidate, baseline, "--no-cache").exit_code == 0
    assert len(candidate.inputs) == 576
    assert not cache_folder.exists()


def test_digests_tell_texts_apart() -> None:
    assert cache.digest("a") != cache.digest("b")
    assert len(cache.digest("ü")) == 16
