"""Limits of control groups, of both versions, in made-up trees of /sys/fs/cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from qembed import cgroup


def tree(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """A made-up /sys/fs/cgroup and /proc/self/cgroup ("own")."""
    root = folder / "cgroup"
    root.mkdir()
    for name, content in files.items():
        path = folder / "own" if name == "own" else root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root, folder / "own"


V2 = {
    "own": "0::/\n",
    "memory.max": "4000\n",
    "memory.current": "3000\n",
    "memory.stat": "anon 900\nfile 2100\ninactive_file 2000\n",
    "cpu.max": "200000 100000\n",
}
V1 = {
    "own": "5:cpu,cpuacct:/\n4:memory:/\n1:name=systemd:/\n",
    "memory/memory.limit_in_bytes": "4000\n",
    "memory/memory.usage_in_bytes": "3000\n",
    "memory/memory.stat": "cache 2100\ntotal_inactive_file 2000\n",
    "cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
    "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(("files", "cpus"), [(V2, 2.0), (V1, 1.5)], ids=["v2", "v1"])
def test_reclaimable_file_cache_is_free_and_the_quota_is_in_cpus(tmp_path: Path, files: dict[str, str], cpus: float) -> None:
    root, own = tree(tmp_path, files)
    memory = cgroup.memory(root, own)
    assert memory is not None
    assert (memory.limit, memory.used, memory.free) == (4000, 1000, 3000)
    assert cgroup.cpus(root, own) == cpus


def test_the_strictest_of_nested_groups_counts(tmp_path: Path) -> None:
    nested = {
        "own": "0::/machine.slice/unit.service\n",
        "machine.slice/memory.max": "9000\n",
        "machine.slice/memory.current": "8500\n",
        "machine.slice/cpu.max": "max 100000\n",
        "machine.slice/unit.service/memory.max": "4000\n",
        "machine.slice/unit.service/memory.current": "1000\n",
        "machine.slice/unit.service/cpu.max": "50000 100000\n",
    }
    root, own = tree(tmp_path, nested)
    memory = cgroup.memory(root, own)
    assert memory is not None
    assert (memory.limit, memory.free) == (9000, 500)
    assert cgroup.cpus(root, own) == 0.5


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"own": "0::/\n", "memory.max": "max\n", "memory.current": "3000\n", "cpu.max": "max 100000\n"},
        {
            "own": "4:memory:/docker/abc\n3:cpu:/docker/abc\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "3000\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["no files", "v2", "v1"],
)
def test_no_limit_is_none(tmp_path: Path, files: dict[str, str]) -> None:
    root, own = tree(tmp_path, files)
    assert cgroup.memory(root, own) is None
    assert cgroup.cpus(root, own) is None


def test_a_path_of_the_host_that_the_container_does_not_have_leaves_its_own_root(tmp_path: Path) -> None:
    root, own = tree(tmp_path, {**V2, "own": "0::/system.slice/docker-abc.scope\n"})
    memory = cgroup.memory(root, own)
    assert memory is not None
    assert memory.limit == 4000
