"""A server's temporary files, and their removal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qembed.vllm import scratch
from qembed.vllm.scratch import Scratch

KILLED = """
import os, signal, tempfile
from pathlib import Path
tempfile.tempdir = {parent!r}
from qembed.vllm import scratch
scratch.SHORT = Path(tempfile.tempdir)
made = scratch.Scratch()
(made.folder / "vllm_dist_1").touch()
made.note([Path({shared!r})])
print(made.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "SHORT", tmp_path)


def test_the_folder_and_shared_memory_are_removed_and_the_log_stays(tmp_path: Path) -> None:
    scratch_folder = Scratch()
    (scratch_folder.folder / "deep").mkdir()
    (scratch_folder.folder / "deep" / "socket").touch()
    shared_memory_file = tmp_path / "psm_1"
    shared_memory_file.touch()
    scratch_folder.note([shared_memory_file, tmp_path / "gone"])
    scratch_folder.remove()
    assert list(tmp_path.iterdir()) == [scratch_folder.log]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
def test_leftovers_of_a_killed_launcher_are_removed_by_the_next(tmp_path: Path) -> None:
    shared_memory_file = Path(f"/dev/shm/psm_qembed_test_{os.getpid()}")
    shared_memory_file.touch()
    code = KILLED.format(parent=str(tmp_path), shared=str(shared_memory_file))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL
    assert Path(result.stdout.strip()).is_dir()
    living = Scratch()
    scratch.remove_abandoned()
    assert not shared_memory_file.exists()
    assert sorted(tmp_path.iterdir()) == sorted([living.folder, living.log])
    living.remove()


def test_the_folder_of_another_user_or_without_a_lock_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qembed-vllm-new", "qembed-vllm-other"):
        (tmp_path / name).mkdir()
    (tmp_path / "qembed-vllm-other" / "lock").touch()
    (tmp_path / "qembed-vllm-link").symlink_to(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 12345678)
    scratch.remove_abandoned()
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3


def test_only_files_in_dev_shm_are_removed_for_a_killed_launcher(tmp_path: Path) -> None:
    folder, precious = tmp_path / "qembed-vllm-x", tmp_path / "precious"
    folder.mkdir()
    precious.touch()
    (folder / "lock").touch()
    (folder / "shared").write_text(f"{precious}\n/dev/shm/../{precious}\n")
    scratch.remove_abandoned()
    assert precious.exists()
    assert not folder.exists()


def test_a_long_name_leaves_room_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    short = Path(tempfile.mkdtemp(dir="/tmp", prefix="q"))
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(scratch, "SHORT", short)
    scratch_folder = Scratch()
    assert scratch_folder.folder.parent == short
    assert scratch_folder.log.parent == long
    scratch_folder.remove()
    short.rmdir()
