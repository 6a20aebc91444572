"""What `qembed serve` says on stderr while it starts and runs: for people, or a JSON object a line."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from qembed.sizes import gib
from qembed.vllm import log, plan, plan_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qembed.vllm.settings import Launch


class Reporter:
    """Stages of the start as a spinner (plain lines where stderr is no terminal), warnings, and the plan."""

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

    def stage(self, doing: str) -> None:
        """Say what is being done."""
        if self._json:
            log.event(doing, event="stage", seconds=round(time.monotonic() - self._start, 1))
        elif self._status is not None:
            self._status.update(f"{doing} …")
            self._status.start()
        elif not self._quiet:
            self._console.print(f"{time.monotonic() - self._start:5.0f} s  {doing}")

    def end(self) -> None:
        """End the spinner."""
        if self._status is not None:
            self._status.stop()

    def warn(self, what: str) -> None:
        """Say what the user should know."""
        self.end()
        if self._json:
            log.event(what, "warning")
        else:
            self._console.print(f"qembed: {what}", markup=False, soft_wrap=True)

    def show_plan(self, launch: Launch) -> None:
        """Print the plan."""
        if self._json:
            log.event(
                "memory plan", event="plan", bytes=plan_table.lines(launch.plan, launch.device), total_bytes=launch.plan.total
            )
            log.event(how(launch), "info", event="computing", computing=computing(launch))
        else:
            self._console.print(plan_table.render(launch.plan, launch.target, notes(launch)), soft_wrap=True)
            self._console.print(how(launch), markup=False, soft_wrap=True)
            self._console.print(verdict(launch), soft_wrap=True)

    def measured(self, launch: Launch, measured: Mapping[str, int]) -> None:
        """Print what was measured beside what was planned, and warn where they differ."""
        if self._json:
            log.event("memory measured", event="measured", bytes=dict(measured), planned_bytes=launch.plan.total)
        else:
            off = measured["total"] / launch.plan.total - 1
            self._console.print(
                f"memory   planned {gib(launch.plan.total)}, measured {gib(measured['total'])} ({off:+.1%})",
                markup=False,
            )
        if (warning := plan_table.deviation(launch.plan, measured, idle=launch.device == "cpu")) is not None:
            self.warn(warning)


def notes(launch: Launch) -> dict[str, str]:
    """What each line of the plan was made from."""
    sizes, cache = launch.sizes, launch.settings.kv_cache_dtype
    each = launch.plan.kv_cache // launch.plan.kv_tokens
    parallel = launch.settings.tensor_parallel_size * launch.settings.data_parallel_size
    whole = plan.reads_whole(sizes.max_model_len, sizes.max_num_batched_tokens)
    held = f"{sizes.max_num_batched_tokens} at once" if whole else f"one text of {sizes.max_model_len}"
    return {
        "token_table": launch.token_table + (", and packed for products by vLLM" if launch.packs_table else ""),
        "linear": "INT4 with scales and zero points" if launch.settings.checkpoint.is_int4 else launch.dtype,
        "kv_cache": f"{launch.plan.kv_tokens} tokens × {_kib(each)} ({launch.dtype if cache == 'auto' else cache}): {held}, "
        f"in {sizes.max_num_seqs} texts",
        "activations": f"{sizes.max_num_batched_tokens} tokens at once",
        "graphs": "estimated",
        "runtime": "estimated",
        "total": f"on each of {parallel} devices" if parallel > 1 and launch.device == "cuda" else "",
    }


def computing(launch: Launch) -> dict[str, str | None]:
    """For scripts: what is computed in, by which INT4 kernel (null where there is none of ours to choose), and why."""
    return {"dtype": launch.dtype, "kernel": launch.choice.kernel, "kernel_reason": launch.choice.reason}


def how(launch: Launch) -> str:
    """The same for people, in one line."""
    return f"computes in {launch.choice.title}: {launch.choice.reason}"


def verdict(launch: Launch) -> str:
    """Whether the plan fits the device."""
    target = launch.target
    if target.free is None or target.memory is None:
        return f"the memory of {target.name} is not known"
    has = f"{target.name} has {gib(target.memory)}"
    has += f", of which {gib(target.free)} are free" if target.free != target.memory else ""
    if launch.needed <= target.free:
        return f"fits: {has}; {gib(target.free - launch.needed)} are left"
    return f"does not fit: {has}; {gib(launch.needed - target.free)} are missing"


def _kib(size: int) -> str:
    return f"{size / 1024:g} KiB"
