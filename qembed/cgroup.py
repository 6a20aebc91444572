"""Limits of the control groups (cgroup v2 and v1) that this process is in: memory, and CPU time.

A container or a systemd unit has a limit of its own, and so may each group around it: the strictest counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
UNLIMITED = 2**60
"""cgroup v1 writes a number near 2**63 where there is no limit."""


@dataclass(frozen=True)
class Memory:
    """Bytes: the `limit`, and what of it is `used` and cannot be reclaimed."""

    limit: int
    used: int

    @property
    def free(self) -> int:
        """Remaining bytes of the limit."""
        return max(0, self.limit - self.used)


def memory(root: Path = ROOT, own: Path = OWN) -> Memory | None:
    """The memory limit that leaves least; None if there is none.

    File cache that the kernel drops when memory is short (`inactive_file`) does not count as used, as in the kernel's own
    estimate of available memory: after a checkpoint was read, all of it is in the cache.
    """
    limits = []
    for group in _groups(root, own, "memory"):
        is_v2 = (group / "memory.max").exists()
        limit = _number(group / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        used = _number(group / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
        if limit is not None and used is not None and limit < UNLIMITED:
            cache = _field(group / "memory.stat", "inactive_file" if is_v2 else "total_inactive_file")
            limits.append(Memory(limit, max(0, used - cache)))
    return min(limits, key=lambda limit: limit.free, default=None)


def cpus(root: Path = ROOT, own: Path = OWN) -> float | None:
    """The CPU quota in CPUs, such as 2.0 or 0.5; None if there is none."""
    quotas = []
    for group in _groups(root, own, "cpu"):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
            else:
                quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
                period = (group / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)


def _groups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folder of this process's group for `controller`, and those of the groups around it, up to `root`."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    paths = {name: path for line in lines if line.count(":") >= 2 for _, name, path in [line.split(":", 2)]}
    v1 = next((name for name in paths if controller in name.split(",")), None)
    top = root if v1 is None else next((root / name for name in (v1, controller) if (root / name).is_dir()), root / controller)
    # In a container the path can be the host's, which is not below its own /sys/fs/cgroup: then only the top exists.
    group = top / paths.get("" if v1 is None else v1, "/").lstrip("/")
    while True:
        yield group
        if group == top or top not in group.parents:
            return
        group = group.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _field(path: Path, name: str) -> int:
    try:
        fields = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0
