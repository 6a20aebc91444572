"""What is read of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qembed.errors import MissingExtra
from qembed.serve import machine


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("Features\t: fp asimd bf16 sve\n", True),
        ("flags\t\t: fpu avx2 avx512f\nbugs\t: avx512_bf16_lookalike\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_used_only_where_the_cpu_has_it(tmp_path: Path, text: str, has: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert machine.has_bfloat16(path) is has


def test_no_cpuinfo_means_no_bfloat16(tmp_path: Path) -> None:
    assert machine.has_bfloat16(tmp_path / "nothing") is False


def test_two_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in ((0, "0,2"), (1, "1,3"), (2, "0,2"), (3, "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3}, raising=False)
    assert machine.cores(tmp_path) == [1, 2]
    assert machine.cores(tmp_path / "unknown") == [1, 2, 3]


def test_missing_vllm_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"qembed\[gpu\].*deploy/requirements/cpu.txt"):
        machine.check_vllm()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc here")
def test_this_process_is_found_in_its_session_and_holds_memory() -> None:
    session = os.getsid(0)
    assert os.getpid() in machine.processes(session)
    assert (machine.resident(session) or 0) > 2**20
