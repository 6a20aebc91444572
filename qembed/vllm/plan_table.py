"""The plan for people and for scripts, and beside it what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qembed.sizes import gib
from qembed.vllm.devices import Target
from qembed.vllm.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

TOLERANCE = 0.15
DESCRIPTIONS = {
    "token_table": "token table",
    "linear": "linear layers",
    "other": "norms",
    "kv_cache": "KV cache",
    "activations": "activations",
    "graphs": "CUDA graphs",
    "runtime": "CUDA context, workspaces",
}
ON_CPU = {**DESCRIPTIONS, "runtime": "Python, torch, vLLM, tokenizer"}


def lines(plan: Plan, kind: str) -> dict[str, int]:
    """The plan's lines in their order: bytes by the name of the field of `Plan`. A CPU has no graphs."""
    return {name: getattr(plan, name) for name in DESCRIPTIONS if kind == "cuda" or name != "graphs"}


def as_json(plan: Plan, target: Target, sizes: Mapping[str, Any], needed: int) -> dict[str, Any]:
    """What `--plan --json` prints; all memory in bytes. `needed` is what the device has to hold."""
    return {
        "bytes": lines(plan, target.kind),
        "total_bytes": plan.total,
        "kv_cache_tokens": plan.kv_tokens,
        **sizes,
        "device": {"kind": target.kind, "name": target.name, "memory_bytes": target.memory, "free_bytes": target.free},
        "fits": None if target.free is None else needed <= target.free,
    }


def render(plan: Plan, target: Target, notes: Mapping[str, str]) -> Table:
    """A table of the plan; `notes` say what a line was made from."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    names = DESCRIPTIONS if target.kind == "cuda" else ON_CPU
    for name, planned in lines(plan, target.kind).items():
        table.add_row(names[name], gib(planned), notes.get(name, ""))
    table.add_row("total", gib(plan.total), notes.get("total", ""), style="bold")
    return table


def deviation(plan: Plan, measured: Mapping[str, int], idle: bool = False) -> str | None:
    """A warning where "total" of `measured` is off by more than 15%, which names the line that is furthest off; else None.

    A CPU that is `idle` has not computed a full batch yet, so the activations may still be missing.

    Lines that were measured by themselves are compared by themselves. Whatever the total is off beyond them lies in what was
    not: on a CPU the processes with their libraries, on a GPU the context and the workspaces.
    """
    total = measured["total"]
    least = plan.total - (plan.activations if idle else 0)
    if (1 - TOLERANCE) * least <= total <= (1 + TOLERANCE) * plan.total:
        return None
    apart = {"weights": plan.weights, **{name: getattr(plan, name) for name in DESCRIPTIONS}}
    off = {name: measured[name] - apart[name] for name in measured if name != "total"}
    off["runtime"] = off.get("runtime", 0) + total - plan.total - sum(off.values())
    worst = max(off, key=lambda name: abs(off[name]))
    names = {**DESCRIPTIONS, "weights": "weights", "runtime": "context, processes and libraries"}
    return (
        f"memory is {gib(total)}, {abs(total / plan.total - 1):.0%} {'more' if total > plan.total else 'less'} than the "
        f"planned {gib(plan.total)}; most of it in: {names[worst]} "
        f"(planned {gib(apart[worst])}, measured about {gib(max(0, apart[worst] + off[worst]))})"
    )
