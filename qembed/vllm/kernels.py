"""The fastest dtype and INT4 kernel for a CPU, by its instruction sets and by which kernels are installed.

The rules follow `make bench-serve` (bench/RESULTS.md), which no CPU with AMX has run.

- qembed's compiled kernel, in bfloat16 if the CPU has bfloat16 instructions (as fast as float32, half the KV cache), otherwise
  in float32. vLLM's kernel unpacks weights to bfloat16 first, which costs more than it saves, most of all on CPUs without
  bfloat16 instructions. With AMX both are about as fast; the results of qembed's do not depend on the other texts of a batch.
- Without the compiled kernel: vLLM's if the CPU has AVX-512 with bfloat16 instructions, otherwise torch, in float32.
- Not quantized: bfloat16 if the CPU has bfloat16 instructions, otherwise float32.
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
COMPILED_NEEDS = frozenset({"avx2", "fma", "f16c"})
REPORTED = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "sve", "bf16")
"""The instruction sets that decide how fast products are, by their names in /proc/cpuinfo."""
CAPABILITY_LIMIT = "ATEN_CPU_CAPABILITY"
"""torch's environment variable that limits the instruction sets it uses. The plugin obeys it too."""
LIBRARY = "qembed.serve.vllm_plugin._int4_kernel"
"""The module name of the compiled kernel."""
DISABLED_KERNELS = "VLLM_DISABLED_KERNELS"
"""vLLM's environment variable with the names of kernels not to use, separated by commas."""
PLUGIN_KERNEL, STOCK_KERNEL = "Int4LinearKernel", "CPUWNA16LinearKernel"
"""vLLM's names of the two INT4 kernels for CPUs: the plugin's and its own."""

Kernel = Literal["qembed", "qembed-torch", "vllm"]
NAMES: Mapping[Kernel, str] = {
    "qembed": "qembed's INT4 kernel",
    "qembed-torch": "qembed's INT4 in torch",
    "vllm": "vLLM's INT4 kernel",
}


@dataclass(frozen=True)
class Cpu:
    """A CPU and the kernels for it.

    Attributes:
        flags: its instruction sets, by their names in /proc/cpuinfo.
        compiled: whether qembed's compiled kernel is installed.
        disabled: the kernels in the user's VLLM_DISABLED_KERNELS.
    """

    flags: frozenset[str] = frozenset()
    compiled: bool = False
    disabled: frozenset[str] = frozenset()

    @property
    def shown(self) -> str:
        """Its instruction sets among REPORTED, for people."""
        return ", ".join(name for name in REPORTED if name in self.flags) or "no vector instructions known"

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 in hardware."""
        return not BFLOAT16.isdisjoint(self.flags)


@dataclass(frozen=True)
class Choice:
    """The dtype of the computation, the INT4 kernel (None: not INT4, or on a GPU), and the reason."""

    dtype: str
    kernel: Kernel | None
    reason: str

    @property
    def title(self) -> str:
        """Dtype and kernel for people: "float32, qembed's INT4 kernel"."""
        return self.dtype if self.kernel is None else f"{self.dtype}, {NAMES[self.kernel]}"


def this_cpu(cpuinfo: Path = Path("/proc/cpuinfo"), environment: Mapping[str, str] = os.environ) -> Cpu:
    """This machine's CPU; without any instruction sets if `cpuinfo` cannot be read."""
    try:
        line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        line = None
    flags = frozenset(line[1].split() if line else ())
    if environment.get(CAPABILITY_LIMIT, "").lower() in ("avx2", "default"):
        flags = frozenset(flag for flag in flags if not flag.startswith(("avx512", "amx", "avx_vnni")))
    return Cpu(flags, find_spec(LIBRARY) is not None, frozenset(environment.get(DISABLED_KERNELS, "").split(",")))


def choose(cpu: Cpu, *, int4: bool, dtype: str = "auto") -> Choice:
    """Dtype and INT4 kernel on `cpu`. `int4`: whether the linear layers are INT4.

    A `dtype` other than "auto" is the user's choice; then only the kernel is chosen.
    """
    if not int4:
        best = "bfloat16" if cpu.has_bfloat16 else "float32"
        reason = "a CPU with bfloat16 instructions" if cpu.has_bfloat16 else "a CPU without bfloat16 instructions"
        return Choice(best, None, reason) if dtype == "auto" else Choice(dtype, None, "--dtype")
    kernel, best, reason = _int4(cpu, dtype)
    return Choice(best if dtype == "auto" else dtype, kernel, reason)


def _int4(cpu: Cpu, dtype: str) -> tuple[Kernel, str, str]:
    """The kernel, the fastest dtype with it, and the reason."""
    compiled = cpu.compiled and cpu.flags >= COMPILED_NEEDS
    plugin: Kernel = "qembed" if compiled else "qembed-torch"
    missing = "qembed's compiled INT4 kernel is missing"
    if "avx512f" not in cpu.flags:
        reason = "vLLM has no INT4 kernel for a CPU without AVX-512"
        return plugin, "float32", reason if compiled or "avx2" not in cpu.flags else f"{reason}, and {missing}"
    if dtype == "float32":
        return plugin, "float32", "vLLM's INT4 kernel has no float32"
    if STOCK_KERNEL in cpu.disabled:
        return plugin, "bfloat16" if compiled and cpu.has_bfloat16 else "float32", DISABLED_KERNELS
    if PLUGIN_KERNEL in cpu.disabled:
        return "vllm", "bfloat16", DISABLED_KERNELS
    if compiled and cpu.flags >= AMX:
        return plugin, "bfloat16", "it multiplies exact integers in AMX tiles"
    if compiled and cpu.has_bfloat16:
        return plugin, "bfloat16", "faster than vLLM's kernel without AMX, and with bfloat16 instructions as fast as in float32"
    if compiled:
        return plugin, "float32", "the fastest on a CPU without bfloat16 instructions"
    if cpu.has_bfloat16:
        return "vllm", "bfloat16", missing
    return plugin, "float32", f"{missing}, and vLLM's is slow without bfloat16 instructions"
