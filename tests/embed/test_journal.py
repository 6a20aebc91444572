"""An interrupted run is resumed only from this user's own files, with the sizes in the journal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qembed import own_files
from qembed.embed import journal, windows
from qembed.embed.journal import Totals
from qembed.embed.spool import FILES, HEAD, Spool
from qembed.embed.windows import Position
from qembed.errors import BadInput

from .conftest import Embed


@pytest.fixture
def interrupted(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A run that has written two of its windows, and a function that resumes it."""
    monkeypatch.setattr(windows, "ROWS", 10)
    source = tmp_path / "in.txt"
    source.write_text("".join(f"text {n}\n" for n in range(30)))
    record = journal.Journal.record

    def stop(self: journal.Journal, totals: Totals) -> None:
        record(self, totals)
        if totals.windows == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "record", stop)
        embed(source, "-o", tmp_path / "out.npy")
    assert (tmp_path / ".out.npy.partial" / "vectors").stat().st_size > 1000
    return lambda: embed(source, "-o", tmp_path / "out.npy")


def test_an_interrupted_run_is_resumed(interrupted: Callable[[], Any], tmp_path: Path) -> None:
    assert interrupted().exit_code == 0
    assert (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("name", ["vectors", "ids.jsonl"])
@pytest.mark.parametrize("length", [None, 0, 500])
def test_a_file_shorter_than_in_the_journal_is_an_error(
    interrupted: Callable[[], Any], tmp_path: Path, name: str, length: int | None
) -> None:
    path = tmp_path / ".out.npy.partial" / name
    path.unlink() if length is None else os.truncate(path, min(length, path.stat().st_size - 1))
    result = interrupted()
    assert result.exit_code == 2, result.output
    assert str(path) in result.stderr
    assert "the journal says" in result.stderr
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("name", ["vectors", "ids.jsonl", "rejects.jsonl", "batches-0", "journal.jsonl"])
def test_a_link_in_the_folder_is_not_followed(interrupted: Callable[[], Any], tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    path = tmp_path / ".out.npy.partial" / name
    content = path.read_bytes() if path.exists() else b""
    precious.write_bytes(content + b"mine")
    path.unlink(missing_ok=True)
    path.symlink_to(precious)
    result = interrupted()
    assert result.exit_code == 2, result.output
    assert str(path) in result.stderr
    assert precious.read_bytes() == content + b"mine"


def test_a_folder_of_another_user_or_behind_a_link_is_not_used(
    interrupted: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / ".out.npy.partial"
    with monkeypatch.context() as patch:
        patch.setattr(own_files.os, "geteuid", lambda: os.getuid() + 1)
        result = interrupted()
    assert result.exit_code == 2
    assert "another user" in result.stderr
    partial.rename(tmp_path / "moved")
    partial.symlink_to(tmp_path / "moved")
    result = interrupted()
    assert result.exit_code == 2
    assert str(partial) in result.stderr


@pytest.mark.parametrize(
    "record",
    [
        {"done": 5},
        {"done": {"windows": 1}},
        {"done": {**Totals().__dict__, "mark": Position().__dict__, "windows": -1}},
        {"done": {**Totals().__dict__, "mark": Position().__dict__, "sizes": {"../../x": 1}}},
        {"done": {**Totals().__dict__, "mark": {"rows": "x", "chunks": 0, "digest": ""}}},
        {"note": "dimensions"},
        {"note": "dimensions", "value": "x"},
    ],
)
def test_a_line_of_the_journal_that_no_run_writes_is_an_error(
    interrupted: Callable[[], Any], tmp_path: Path, record: dict[str, Any]
) -> None:
    path = tmp_path / ".out.npy.partial" / "journal.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    result = interrupted()
    assert result.exit_code == 2, result.output
    assert str(path) in result.stderr
    assert "unexpected" not in result.stderr


def test_a_batch_longer_than_its_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / FILES[0]).write_bytes(HEAD.pack(0, 0, 2**32 - 1, 2**32 - 1, 2**32 - 1, 0) + b"x" * 100)
    assert Spool(tmp_path).begin(0) == {}
    assert (tmp_path / FILES[0]).stat().st_size == 0


def test_targets_of_another_run_are_read_only_from_a_regular_file(tmp_path: Path) -> None:
    for name, make in (("a", os.mkfifo), ("b", lambda path: path.symlink_to("/dev/zero")), ("c", Path.mkdir)):
        (tmp_path / f".{name}.partial").mkdir()
        make(tmp_path / f".{name}.partial" / journal.TARGETS)
    folder = tmp_path / ".out.npy.partial"
    folder.mkdir()
    journal.claim(folder, [tmp_path / "out.npy"])
    with pytest.raises(BadInput, match="not a regular file"):
        own_files.own_file(tmp_path / ".a.partial" / journal.TARGETS, os.O_RDONLY)
