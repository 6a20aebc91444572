"""Progress, warnings and the memory plan of `qembed serve` on stderr: for people, or one JSON object per line."""

from __future__ import annotations

import dataclasses
import json
import time
from types import TracebackType
from typing import TYPE_CHECKING

from qembed.checkpoint.int8_table import INT8
from qembed.serve.vector_facts import vector_facts, vectors_line
from qembed.sizes import gib
from qembed.text.display import escaped
from qembed.vllm import log, plan, plan_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qembed.vllm.settings import Launch
    from qembed.vllm.supervisor import Server

LINES = "\t\n"
"""Control characters of a message."""


class Reporter:
    """Reports stages of the start as a spinner (as lines if stderr is no terminal), warnings, and the memory plan.

    `quiet` hides the stages. Leaving its `with` block stops the spinner.
    """

    def __init__(self, style: str, quiet: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._json = style == "json"
        self._quiet = quiet
        self._status = None if quiet or self._json or not self._console.is_terminal else self._console.status("starting")
        self._start = time.monotonic()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def stage(self, name: str) -> None:
        """Report a stage of the start."""
        if self._json:
            log.event(name, event="stage", seconds=round(time.monotonic() - self._start, 1))
        elif self._status is not None:
            self._status.update(f"{name} …")
            self._status.start()
        elif not self._quiet:
            self._console.print(f"{time.monotonic() - self._start:5.0f} s  {name}")

    def end(self) -> None:
        """Stop the spinner."""
        if self._status is not None:
            self._status.stop()

    def warn(self, message: str) -> None:
        """Report a warning."""
        self.end()
        if self._json:
            log.event(message, "warning")
        else:
            self._console.print(f"qembed: {escaped(message, LINES)}", markup=False, soft_wrap=True)

    def note(self, message: str) -> None:
        """Report a message that is no warning."""
        self.end()
        if self._json:
            log.event(message)
        else:
            self._console.print(escaped(message, LINES), markup=False, soft_wrap=True)

    def show_plan(self, launch: Launch) -> None:
        """Report the plan, and the dtype and kernel."""
        if self._json:
            log.event(
                "memory plan", event="plan", bytes=plan_table.lines(launch.plan, launch.device), total_bytes=launch.plan.total
            )
            log.event(computing_line(launch), "info", event="computing", computing=computing(launch))
            log.event(vectors_line(launch), "info", event="vectors", vectors=vector_facts(launch))
        else:
            self._console.print(plan_table.render(launch.plan, launch.target, notes(launch)), soft_wrap=True)
            self._console.print(computing_line(launch), markup=False, soft_wrap=True)
            self._console.print(escaped(vectors_line(launch)), markup=False, soft_wrap=True)
            self._console.print(verdict(launch), soft_wrap=True)

    def measured(self, launch: Launch, measured: Mapping[str, int]) -> None:
        """Report measured beside planned memory, and warn if they differ."""
        if self._json:
            log.event("memory measured", event="measured", bytes=dict(measured), planned_bytes=launch.plan.total)
        else:
            deviation = measured["total"] / launch.plan.total - 1
            self._console.print(
                f"memory   planned {gib(launch.plan.total)}, measured {gib(measured['total'])} ({deviation:+.1%})",
                markup=False,
            )
        if (warning := plan_table.deviation(launch.plan, measured, idle=launch.device == "cpu")) is not None:
            self.warn(warning)


def ready_line(server: Server, measured: Mapping[str, int], as_json: bool) -> str:
    """The line for stdout when the server answers."""
    launch, memory_bytes = server.launch, measured.get("total", server.launch.plan.total)
    if as_json:
        return json.dumps(
            {
                "url": server.url,
                "model": server.model,
                "folder": str(launch.settings.checkpoint.folder),
                "int4": launch.settings.checkpoint.is_int4,
                "device": launch.device,
                **computing(launch),
                "token_table": launch.token_table,
                "vectors": vector_facts(launch),
                "memory_bytes": memory_bytes,
                "planned_bytes": launch.plan.total,
                "plan": plan_table.lines(launch.plan, launch.device),
                "weights_bytes": launch.plan.weights,
                "kv_cache_bytes": launch.plan.kv_cache,
                **dataclasses.asdict(launch.sizes),
                "pid": server.process.pid,
            }
        )
    kind = "INT4" if launch.settings.checkpoint.is_int4 else "not quantized"
    kind += ", INT8 token table" if launch.token_table == INT8 else ""
    return (
        f"{server.url}  model {server.model} ({kind})  {vectors_line(launch)}  device {launch.device} ({launch.choice.title})  "
        f"memory {gib(memory_bytes)} (planned {gib(launch.plan.total)}: weights {gib(launch.plan.weights)}, "
        f"keys and values {gib(launch.plan.kv_cache)})"
    )


def notes(launch: Launch) -> dict[str, str]:
    """Explanations of the plan's lines, by name."""
    sizes, cache = launch.sizes, launch.settings.kv_cache_dtype
    per_token = _kib(launch.plan.kv_cache // launch.plan.kv_tokens)
    cache_dtype = launch.dtype if cache == "auto" else cache
    parallel = launch.settings.tensor_parallel_size * launch.settings.data_parallel_size
    reads_whole = plan.reads_whole(sizes.max_model_len, sizes.max_num_batched_tokens)
    extent = f"{sizes.max_num_batched_tokens} at once" if reads_whole else f"one text of {sizes.max_model_len}"
    extent = f": {extent}, in {sizes.max_num_seqs} texts" if launch.keeps_cache else ", a layer at a time"
    return {
        "token_table": launch.token_table + (", and packed for products by vLLM" if launch.has_packed_table else ""),
        "linear": "INT4 with scales and zero points" if launch.settings.checkpoint.is_int4 else launch.dtype,
        "kv_cache": f"{launch.plan.kv_tokens} tokens × {per_token} ({cache_dtype}){extent}",
        "activations": f"{sizes.max_num_batched_tokens} tokens at once",
        "graphs": "estimated",
        "runtime": "estimated",
        "total": f"on each of {parallel} devices" if parallel > 1 and launch.device == "cuda" else "",
    }


def computing(launch: Launch) -> dict[str, str | None]:
    """For scripts: the dtype, the INT4 kernel (None if not INT4, or on a GPU), and the reason for the choice."""
    return {"dtype": launch.dtype, "kernel": launch.choice.kernel, "kernel_reason": launch.choice.reason}


def computing_line(launch: Launch) -> str:
    """The same for people, in one line."""
    return f"computes in {launch.choice.title}: {launch.choice.reason}"


def verdict(launch: Launch) -> str:
    """Whether the plan fits the device."""
    target = launch.target
    if target.free is None or target.memory is None:
        return f"the memory of {target.name} is not known"
    memory = f"{target.name} has {gib(target.memory)}"
    memory += f", of which {gib(target.free)} are free" if target.free != target.memory else ""
    if launch.needed <= target.free:
        return f"fits: {memory}; {gib(target.free - launch.needed)} are left"
    return f"does not fit: {memory}; {gib(launch.needed - target.free)} are missing"


def show_plan(launch: Launch, as_json: bool) -> int:
    """Print the plan for --plan. Returns the exit code: 0 if it fits, else 1."""
    from rich.console import Console

    target = launch.target
    fits = target.free is None or launch.needed <= target.free
    if as_json:
        sizes = dataclasses.asdict(launch.sizes) | computing(launch) | {"vectors": vector_facts(launch)}
        print(json.dumps(plan_table.as_json(launch.plan, target, sizes, launch.needed)))
        return 0 if fits else 1
    console = Console(highlight=False, soft_wrap=True)
    console.print(plan_table.render(launch.plan, target, notes(launch)))
    for line in (computing_line(launch), vectors_line(launch), verdict(launch)):
        console.print(escaped(line), markup=False)
    return 0 if fits else 1


def _kib(size: int) -> str:
    return f"{size / 1024:g} KiB"
