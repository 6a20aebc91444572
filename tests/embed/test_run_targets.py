"""`qembed embed` never replaces its input, a device, or a file of another run."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qembed.checkpoint.find import SAMPLE, find
from qembed.embed import job_options, journal

from .conftest import Embed, contents
from .fake_engine import computing


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n')
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("in.jsonl", "-o", "in.jsonl"),
        ("in.jsonl", "-o", "./in.jsonl"),
        ("in.jsonl", "-o", "hard.jsonl"),
        ("in.jsonl", "-o", "soft.jsonl"),
        ("in.jsonl", "-o", "out.npy", "--rejects", "in.jsonl"),
        ("in.jsonl", "-o", "out.npy", "--rejects", "out.npy"),
        ("in.jsonl", "-o", "out.npy", "--rejects", "out.ids.jsonl"),
        ("in.jsonl", "-o", "out.npy", "--rejects", "fifo"),
        ("in.jsonl", "-o", "out.npy", "--rejects", "/dev/null"),
        ("in.jsonl", "-o", "out.npy", "--rejects", "."),
        ("in.ids.jsonl", "-o", "in.npy"),
        (".", "-o", "in.jsonl"),
        ("in.jsonl", "-o", "."),
        ("in.jsonl", "-o", "/"),
        ("in.jsonl", "-o", "new/.."),
        (".", "-o", "out.npy", "--rejects", "in.jsonl"),
    ],
)
def test_outputs_that_would_overwrite_an_input_are_refused_even_with_force(
    embed: Embed, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    os.link(source, tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(source)
    shutil.copy(source, tmp_path / "in.ids.jsonl")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for force in ((), ("--force",)):
        result = embed(*arguments, *force)
        assert result.exit_code == 2, result.output
        assert contents(tmp_path) == before
        assert (tmp_path / "fifo").is_fifo()
        assert Path("/dev/null").is_char_device()


def test_runs_that_would_share_an_ids_file_are_refused(embed: Embed, source: Path, tmp_path: Path) -> None:
    other = tmp_path / ".v.npy.partial"
    other.mkdir()
    journal.claim(other, [tmp_path / "v.npy", tmp_path / "v.ids.jsonl"])
    result = embed(source, "-o", tmp_path / "v.fvecs")
    assert result.exit_code == 2
    assert "v.ids.jsonl" in result.stderr
    assert str(other) in result.stderr
    assert not (tmp_path / ".v.fvecs.partial").exists()
    assert embed(source, "-o", tmp_path / "w.fvecs").exit_code == 4
    shutil.rmtree(other)
    assert embed(source, "-o", tmp_path / "v.fvecs").exit_code == 4


def test_a_file_created_during_the_run_is_kept(
    embed: Embed, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.npy"
    claim = journal.claim

    def appear(*arguments: object) -> None:
        claim(*arguments)  # type: ignore[arg-type]
        out.write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "claim", appear)
        result = embed(source, "-o", out)
    assert result.exit_code == 2, result.output
    assert "exists already" in result.stderr
    assert out.read_text() == "mine"
    out.unlink()
    assert embed(source, "-o", out).exit_code == 4
    assert np.load(out).shape == (1, 16)


def test_the_checkpoint_is_an_input_and_vectors_beside_it_are_none(
    embed: Embed, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(find(SAMPLE).folder, tmp_path / "model"))
    monkeypatch.setattr(
        job_options, "_in_process", lambda *arguments: replace(computing(*arguments), checkpoint=find(str(folder)))
    )
    config = (folder / "config.json").read_text()
    refused = embed(source, "-o", tmp_path / "out.npy", "--rejects", folder / "config.json", "--force")
    assert (refused.exit_code, "is the input" in refused.stderr) == (2, True)
    assert (folder / "config.json").read_text() == config
    for _ in range(2):
        assert embed(source, "-o", folder / "out.npy", "--force").exit_code == 4
