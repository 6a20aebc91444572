"""Facts about the machine: cores, processes, GPUs, memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qembed.errors import MissingExtra, QembedError
from qembed.vllm import machine


def test_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in ((0, "0,2"), (1, "1,3"), (2, "0,2"), (3, "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3}, raising=False)
    assert machine.cores(tmp_path, 64) == [1, 2]
    assert machine.cores(tmp_path / "unknown", 64) == [1, 2, 3]
    assert [len(machine.cores(tmp_path / "unknown", quota)) for quota in (0.5, 1.0, 2.0, 2.4)] == [1, 1, 2, 2]


def test_missing_vllm_is_reported_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"pip install '?vllm>=.*deploy/requirements/cpu.txt"):
        machine.check_vllm()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc here")
def test_a_session_has_this_process_and_resident_memory() -> None:
    session = os.getsid(0)
    assert os.getpid() in machine.processes(session)
    assert (machine.resident(session) or 0) > 2**20


SMI = """\
#!/bin/sh
case "$1" in
  *memory.total*) echo '0, GPU-aaaa, Tesla T4, 15360, 15000, 7.5'; echo '1, GPU-bbbb, NVIDIA L4, 23034, 20000, 8.9' ;;
  *compute-apps*) echo "$$, 100"; echo '77, 400'; echo '78, 50' ;;
  *) echo '0, GPU-aaaa, 360'; echo '1, GPU-bbbb, 3034' ;;
esac
"""


@pytest.fixture
def _two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake nvidia-smi with the output of a machine with a T4 and an L4."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "find_spec", lambda _: None)


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize(
    ("visible", "name"),
    [(None, "Tesla T4"), ("1", "NVIDIA L4"), ("GPU-bb", "NVIDIA L4"), ("1,0", "NVIDIA L4"), ("", "CPU"), ("-1", "CPU")],
)
def test_the_target_is_the_first_visible_gpu(visible: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.target().name == name


@pytest.mark.usefixtures("_two_gpus")
def test_gpu_memory_of_processes_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.cuda_used([77, 78, 79]) == 450 * 2**20
    assert machine.cuda_used([79]) is None
    assert machine.cuda_total_used() == 360 * 2**20
    target = machine.target()
    assert (target.memory, target.free, target.capability) == (15360 * 2**20, 15000 * 2**20, 7.5)


def test_a_containers_lower_memory_limit_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   12000000 kB\n")
    own = tmp_path / "own"
    own.write_text("0::/\n")
    assert machine.host(meminfo, tmp_path / "none", own).free == 12_000_000 * 1024
    for name, size in (("memory.max", 4 * 2**30), ("memory.current", 2**30)):
        (tmp_path / name).write_text(str(size))
    limited = machine.host(meminfo, tmp_path, own)
    assert (limited.memory, limited.free) == (4 * 2**30, 3 * 2**30)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.host(meminfo, tmp_path, own).memory == 16_000_000 * 1024


def test_a_device_that_vllm_cannot_use_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "cpuinfo"
    old.write_text("flags\t\t: fpu sse4_2 avx\n")
    monkeypatch.setattr(machine, "_is_cpu_build", lambda: True)
    with pytest.raises(QembedError, match="no AVX2"):
        machine.check_device(old)
    old.write_text("flags\t\t: fpu avx2\n")
    machine.check_device(old)
    monkeypatch.setattr(machine, "_is_cpu_build", lambda: False)
    monkeypatch.setattr(machine, "find_spec", lambda _: True)
    monkeypatch.setattr(machine, "metadata_of", lambda _: "0.26.0")
    monkeypatch.setattr(machine, "device", lambda: "cpu")
    with pytest.raises(QembedError, match="built for NVIDIA GPUs, and no GPU can be used here"):
        machine.check_device()
