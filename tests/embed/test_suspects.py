"""Texts that end the engine: each is rejected after its second crash, and the rest of the corpus is embedded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.victims
from qembed.embed.suspects import CRASHED, FILE, Suspects
from tests.victims import Victims

from .conftest import Embed, contents, expected, rejects
from .fake_engine import BREAK, CRASH, CRASH_TOGETHER, FAIL

TEXTS = [f"text {number}" for number in range(150)]
BAD = 77


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.txt"


def write(source: Path, *bad: str) -> list[str]:
    """A corpus with `bad` texts in one batch; returns the others."""
    texts = [*TEXTS[:BAD], *bad, *TEXTS[BAD + len(bad) :]]
    source.write_text("\n".join(texts))
    return [text for text in texts if text not in bad]


@contextmanager
def victims(**variables: object) -> Iterator[Victims]:
    environment = {f"QEMBED_TEST_{name.upper()}": str(value) for name, value in variables.items()}
    with tests.victims.victims("tests.embed.victim", environment=environment) as run:
        yield run


def vectors(texts: list[str]) -> np.ndarray[Any, Any]:
    return np.stack([expected(text) for text in texts])


@pytest.mark.parametrize("rows", [4096, 40])
def test_a_text_that_ends_the_process_twice_is_rejected_and_the_rest_is_embedded(
    source: Path, tmp_path: Path, rows: int
) -> None:
    out = tmp_path / "out.npy"
    others = write(source, CRASH)
    with victims(rows=rows) as run:
        assert [run.run("embed", source, "-o", out)["code"] for _ in range(3)] == [-9, -9, 4]
    np.testing.assert_array_equal(np.load(out), vectors(others))
    assert rejects(tmp_path / "out.rejects.jsonl") == [
        {"id": str(BAD + 1), "place": f"in.txt, line {BAD + 1}", "reason": CRASHED, "text": CRASH}
    ]
    assert not list(tmp_path.glob(".*"))


def test_each_further_such_text_costs_one_more_run(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    others = write(source, CRASH, "innocent", CRASH, CRASH)
    others.insert(BAD, "innocent")
    with victims() as run:
        codes = [run.run("embed", source, "-o", out)["code"] for _ in range(5)]
    assert codes == [-9, -9, -9, -9, 4]
    np.testing.assert_array_equal(np.load(out), vectors(others))
    assert [reject["id"] for reject in rejects(tmp_path / "out.rejects.jsonl")] == ["78", "80", "81"]


def test_a_batch_that_crashes_only_as_a_whole_is_computed_one_text_at_a_time(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    others = write(source, CRASH_TOGETHER)
    with victims() as run:
        assert [run.run("embed", source, "-o", out)["code"] for _ in range(3)] == [-9, -9, 0]
    assert len(np.load(out)) == len(others) + 1


def test_after_a_single_kill_the_batch_is_computed_as_a_whole(source: Path, tmp_path: Path) -> None:
    """The last bits of a vector depend on its batch."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "work").mkdir()
    out, log = tmp_path / "work" / "out.npy", tmp_path / "log"
    write(source, CRASH)
    with victims(log=log) as run:
        assert run.run("embed", source, "-o", out)["code"] == -9
        in_engine = (out.parent / ".out.npy.partial" / FILE).read_text()
        source.write_text(source.read_text().replace(CRASH, "text 77"))
        log.unlink()
        assert run.run("embed", source, "-o", out)["code"] == 0
        assert '"in_engine": [0, ' in in_engine
        batches = list(map(int, log.read_text().split()))
        assert sorted(batches) == [*[1] * 22, 22, 64, 64]  # the batch of the short texts, alone and together
        assert run.run("embed", source, "-o", tmp_path / "whole" / "out.npy")["code"] == 0
    assert contents(out.parent) == contents(tmp_path / "whole")


def test_a_text_that_the_engine_fails_on_is_rejected_in_the_same_run(embed: Embed, source: Path, tmp_path: Path) -> None:
    others = write(source, FAIL)
    result = embed(source, "-o", tmp_path / "out.npy")
    assert result.exit_code == 4, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors(others))
    assert [(reject["id"], reject["reason"]) for reject in rejects(tmp_path / "out.rejects.jsonl")] == [
        (str(BAD + 1), "vLLM failed: an error")
    ]


def test_a_text_that_breaks_the_engine_ends_two_runs_and_is_then_rejected(embed: Embed, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    others = write(source, BREAK)
    for _ in range(2):
        failed = embed(source, "-o", out)
        assert failed.exit_code == 1, failed.output
        assert "vLLM failed: an error; the same command resumes" in failed.stderr
    result = embed(source, "-o", out)
    assert result.exit_code == 4, result.output
    np.testing.assert_array_equal(np.load(out), vectors(others))
    assert [reject["reason"] for reject in rejects(tmp_path / "out.rejects.jsonl")] == [CRASHED]


def test_an_interrupted_batch_is_not_suspected(tmp_path: Path) -> None:
    class Interrupted:
        dimensions, in_process = 2, True

        def embed(self, _: object) -> Iterator[Any]:
            raise KeyboardInterrupt

    path = tmp_path / FILE
    with pytest.raises(KeyboardInterrupt):
        list(Suspects(path).embed(Interrupted(), 0, {5: []}))  # type: ignore[arg-type]
    assert (0, 5) not in Suspects(path)


@pytest.mark.parametrize("content", ["", '{"in_engine": [0', "[]"])
def test_a_partly_written_file_of_suspects_is_ignored(tmp_path: Path, content: str) -> None:
    path = tmp_path / FILE
    path.write_text(content)
    assert (0, 0) not in Suspects(path)
