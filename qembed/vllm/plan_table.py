"""The memory plan as a table and as JSON, and its deviation from measured memory."""

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
    "kv_cache": "keys and values",
    "activations": "activations",
    "graphs": "CUDA graphs",
    "runtime": "CUDA context, workspaces",
}
ON_CPU = {**DESCRIPTIONS, "runtime": "Python, torch, vLLM, tokenizer"}


def lines(plan: Plan, kind: str) -> dict[str, int]:
    """The plan's lines in order: bytes by field name of `Plan`. A CPU has no graphs."""
    return {name: getattr(plan, name) for name in DESCRIPTIONS if kind == "cuda" or name != "graphs"}


def as_json(plan: Plan, target: Target, sizes: Mapping[str, Any], needed: int) -> dict[str, Any]:
    """The output of `--plan --json`, memory in bytes. `needed` is the memory that the device must have free."""
    return {
        "bytes": lines(plan, target.kind),
        "total_bytes": plan.total,
        "kv_cache_tokens": plan.kv_tokens,
        **sizes,
        "device": {"kind": target.kind, "name": target.name, "memory_bytes": target.memory, "free_bytes": target.free},
        "fits": None if target.free is None else needed <= target.free,
    }


def render(plan: Plan, target: Target, notes: Mapping[str, str]) -> Table:
    """A table of the plan. `notes` explain lines, by name."""
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
    """A warning if "total" of `measured` deviates by more than 15%, with the line that deviates most; else None.

    `idle`: no full batch has been computed yet, so memory for activations, keys and values may not be in use.

    Lines in `measured` are compared one by one. The rest of the deviation is attributed to "runtime", which cannot be
    measured: processes and libraries on a CPU, context and workspaces on a GPU.
    """
    total = measured["total"]
    minimum = plan.total - (plan.activations + plan.kv_cache if idle else 0)
    if (1 - TOLERANCE) * minimum <= total <= (1 + TOLERANCE) * plan.total:
        return None
    planned = {"weights": plan.weights, **{name: getattr(plan, name) for name in DESCRIPTIONS}}
    deviations = {name: measured[name] - planned[name] for name in measured if name != "total"}
    deviations["runtime"] = deviations.get("runtime", 0) + total - plan.total - sum(deviations.values())
    worst = max(deviations, key=lambda name: abs(deviations[name]))
    names = {**DESCRIPTIONS, "weights": "weights", "runtime": "context, processes and libraries"}
    return (
        f"memory is {gib(total)}, {abs(total / plan.total - 1):.0%} {'more' if total > plan.total else 'less'} than the "
        f"planned {gib(plan.total)}; most of it in: {names[worst]} "
        f"(planned {gib(planned[worst])}, measured about {gib(max(0, planned[worst] + deviations[worst]))})"
    )
