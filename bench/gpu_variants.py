"""The servers that gpu.py compares, and whether vLLM really ran what a variant asks for: by the lines of its log."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from gpu_steps import LeftOut, Setup

from qembed.checkpoint.int8_table import INT8, QUANT_METHOD
from qembed.vllm import kernels

LOADED = {
    "dtype": r"\bdtype=torch\.(\w+)",
    "quantization": r"\bquantization=(\w+)",
    "cache": r"\bkv_cache_dtype=(\w+)",
    "kernel": r"Using (\w+LinearKernel) for",
    "attention": r"Using (\w+) attention backend",
    "attention_version": r"FlashAttention version (\d)",
}
"""What the log tells about the engine, each with its expression."""


@dataclass(frozen=True)
class Variant:
    """A server.

    Attributes:
        options: of `qembed serve`.
        int4: whether it serves the INT4 checkpoint, not the original.
        variables: of its environment.
        loaded: what `loaded` must give for it.
    """

    options: tuple[str, ...] = ()
    int4: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)
    loaded: Mapping[str, str] = field(default_factory=dict)


VARIANTS: Mapping[str, Variant] = {
    "int4": Variant(),
    "int4 by Marlin": Variant(
        variables={kernels.DISABLED_KERNELS: "MacheteLinearKernel"}, loaded={"kernel": "MarlinLinearKernel"}
    ),
    "fp16": Variant(int4=False, loaded={"quantization": "None"}),
    "int4, 8k context": Variant(),
    "int4, float16": Variant(("--dtype", "float16"), loaded={"dtype": "float16"}),
    "int4, INT8 table": Variant(("--token-table", INT8), loaded={"quantization": QUANT_METHOD}),
    "int4, fp8 keys and values": Variant(("--kv-cache-dtype", "fp8"), loaded={"cache": "fp8"}),
}
"""By their names in RESULTS.md. On Hopper vLLM prefers Machete to Marlin; T4, L4 and A10G have Marlin only."""


def on(setup: Setup, name: str, cpu: Callable[[], kernels.Cpu] = kernels.this_cpu) -> Variant:
    """The variant `name` as it runs on the device of `setup`. On a CPU another kernel of the CPU stands in for Marlin.

    Raises:
        LeftOut: this device has nothing like it.
    """
    variant = VARIANTS[name]
    if not setup.is_rehearsal:
        return variant
    if "cache" in variant.loaded:
        raise LeftOut("a CPU has no fp8 keys and values")
    if variant.loaded.get("kernel") == "MarlinLinearKernel":
        here = cpu()
        if kernels.choose(replace(here, disabled=frozenset({kernels.PLUGIN_KERNEL})), int4=True).kernel != "vllm":
            raise LeftOut("this CPU has one INT4 kernel only")
        return replace(
            variant, variables={kernels.DISABLED_KERNELS: kernels.PLUGIN_KERNEL}, loaded={"kernel": kernels.STOCK_KERNEL}
        )
    return variant


def loaded(log: str) -> dict[str, str]:
    """What vLLM's `log` tells about its engine: the last match of each expression of LOADED."""
    return {name: matches[-1] for name, line in LOADED.items() if (matches := re.findall(line, log))}


def check(name: str, variant: Variant, engine: Mapping[str, str]) -> None:
    """Check that the options of `variant` took effect in `engine`, as `loaded` returns it.

    Raises:
        ValueError: one did not; its numbers would be those of another variant.
    """
    for key, expected in variant.loaded.items():
        if engine.get(key) != expected:
            raise ValueError(f"{name}: vLLM has the {key} {engine.get(key, 'that its log does not tell')}, not {expected}")
