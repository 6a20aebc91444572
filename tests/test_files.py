"""Atomic writes and SHA-256."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qembed import files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_atomically(path, "old")

    def fail(_: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (calls.append("replace"), replace(self, target))[1])
    files.write_atomically(tmp_path / "a.bin", b"\0\xff")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "a.bin").read_bytes() == b"\0\xff"


def test_sha256_is_of_all_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 3)
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"67")
    assert files.sha256(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"1234567").hexdigest()
