"""Which dtype and which INT4 kernel are fastest on a CPU, by its instruction sets and by what is installed.

The rules are those of `make bench-serve` (bench/RESULTS.md) for the CPUs that were at hand; AMX was not.

- AMX: vLLM's INT4 kernel, in bfloat16. It multiplies in tiles, 8-bit activations by 4-bit weights. Never measured.
- AVX2 or AVX-512 without AMX: our compiled kernel, in bfloat16 where the CPU has instructions for it (as fast as in float32,
  half the KV cache), otherwise in float32. vLLM's kernel unpacks weights to bfloat16 first, which costs more than it saves,
  most of all on CPUs that have no bfloat16 instructions.
- Our compiled kernel missing: vLLM's where the CPU has AVX-512 with bfloat16 instructions, otherwise ours in torch, in float32.
- Not quantized: bfloat16 where the CPU has instructions for it, otherwise float32.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
AMX = frozenset({"avx512f", "amx_tile", "amx_int8", "amx_bf16"})
NEEDED_BY_COMPILED = frozenset({"avx2", "fma", "f16c"})
SHOWN = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "sve", "bf16")
"""The instruction sets that decide the speed of products, as /proc/cpuinfo calls them."""
LIMIT = "ATEN_CPU_CAPABILITY"
"""torch's variable for using less than the CPU has. vLLM's plugin follows it too."""
LIBRARY = "qembed.serve.vllm_plugin._int4_kernel"
DISABLED = "VLLM_DISABLED_KERNELS"
OURS, VLLMS = "Int4LinearKernel", "CPUWNA16LinearKernel"
"""What vLLM's variable DISABLED calls the two kernels."""

Kernel = Literal["qembed", "qembed-torch", "vllm"]
NAMES: Mapping[Kernel, str] = {
    "qembed": "qembed's INT4 kernel",
    "qembed-torch": "qembed's INT4 in torch",
    "vllm": "vLLM's INT4 kernel",
}


@dataclass(frozen=True)
class Cpu:
    """What decides on a CPU.

    Attributes:
        flags: its instruction sets, as /proc/cpuinfo calls them.
        compiled: whether our compiled kernel is installed.
        disabled: the kernels that the user's own VLLM_DISABLED_KERNELS names.
    """

    flags: frozenset[str] = frozenset()
    compiled: bool = False
    disabled: frozenset[str] = frozenset()

    @property
    def shown(self) -> str:
        """Its instruction sets, as far as they decide anything here."""
        return ", ".join(name for name in SHOWN if name in self.flags) or "no vector instructions known"

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 in hardware."""
        return not BFLOAT16.isdisjoint(self.flags)


@dataclass(frozen=True)
class Choice:
    """What a model is computed in, the INT4 kernel (None: nothing is in 4 bits, or it is a GPU's), and the reason."""

    dtype: str
    kernel: Kernel | None
    reason: str

    @property
    def title(self) -> str:
        """Dtype and kernel for people: "float32, qembed's INT4 kernel"."""
        return self.dtype if self.kernel is None else f"{self.dtype}, {NAMES[self.kernel]}"


def this_cpu(cpuinfo: Path = Path("/proc/cpuinfo"), environment: Mapping[str, str] = os.environ) -> Cpu:
    """The CPU at hand; one without any instruction sets where `cpuinfo` cannot be read."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    flags = frozenset(found[1].split() if found else ())
    if environment.get(LIMIT, "").lower() in ("avx2", "default"):
        flags = frozenset(flag for flag in flags if not flag.startswith(("avx512", "amx", "avx_vnni")))
    return Cpu(flags, find_spec(LIBRARY) is not None, frozenset(environment.get(DISABLED, "").split(",")))


def choose(cpu: Cpu, *, int4: bool, dtype: str = "auto") -> Choice:
    """Dtype and INT4 kernel on `cpu`; `int4`: whether the linear layers are in 4 bits.

    A `dtype` other than "auto" is what the user asks for, which leaves only the kernel open.
    """
    if not int4:
        best = "bfloat16" if cpu.has_bfloat16 else "float32"
        which = "a CPU with bfloat16 instructions" if cpu.has_bfloat16 else "a CPU without bfloat16 instructions"
        return Choice(best, None, which) if dtype == "auto" else Choice(dtype, None, "--dtype")
    kernel, best, reason = _int4(cpu, dtype)
    return Choice(best if dtype == "auto" else dtype, kernel, reason)


def _int4(cpu: Cpu, dtype: str) -> tuple[Kernel, str, str]:
    """The kernel, the dtype that goes with it, and the reason."""
    compiled = cpu.compiled and cpu.flags >= NEEDED_BY_COMPILED
    ours: Kernel = "qembed" if compiled else "qembed-torch"
    missing = "qembed's compiled INT4 kernel is missing"
    if "avx512f" not in cpu.flags:
        reason = "vLLM has no INT4 kernel for a CPU without AVX-512"
        return ours, "float32", reason if compiled or "avx2" not in cpu.flags else f"{reason}, and {missing}"
    if dtype == "float32":
        return ours, "float32", "vLLM's INT4 kernel has no float32"
    if VLLMS in cpu.disabled:
        return ours, "bfloat16" if compiled and cpu.has_bfloat16 else "float32", DISABLED
    if OURS in cpu.disabled:
        return "vllm", "bfloat16", DISABLED
    if cpu.flags >= AMX:
        return "vllm", "bfloat16", "it multiplies in AMX tiles"
    if compiled and cpu.has_bfloat16:
        return ours, "bfloat16", "faster than vLLM's kernel without AMX, and with bfloat16 instructions as fast as in float32"
    if compiled:
        return ours, "float32", "the fastest on a CPU without bfloat16 instructions"
    if cpu.has_bfloat16:
        return "vllm", "bfloat16", missing
    return ours, "float32", f"{missing}, and vLLM's is slow without bfloat16 instructions"
