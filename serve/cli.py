"""`qembed serve`."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from qembed import checkpoint as checkpoints
from qembed.errors import BadInput
from qembed.serve import engine, plan
from qembed.serve.settings import (
    HOST,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    PORT,
    STARTUP_TIMEOUT,
    Settings,
)
from qembed.token_table import INT8


@click.command("serve")
@click.option("--int4/--fp16", default=True, show_default=True, help="Serve the INT4 checkpoint, or the original it came from.")
@click.option(
    "--model",
    envvar="QEMBED_MODEL",
    show_envvar=True,
    help=f"A folder, a hub id, or '{checkpoints.SAMPLE}'. With --int4 a folder that is INT4 itself, or the model whose INT4 "
    f"folder stands in this directory.  [default: what `qembed quantize` made here; with --fp16 its source, or else "
    f"{checkpoints.DEFAULT_MODEL}]",
)
@click.option("--host", default=HOST, show_default=True, help="Address to listen on; 0.0.0.0 is every one of this machine.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="TCP port to listen on; 0 takes a free one."
)
@click.option("--served-model-name", help="Model name that requests must give.  [default: the name of the folder or hub model]")
@click.option(
    "--max-model-len",
    type=click.IntRange(1),
    help=f"Longest text, in tokens; longer ones are refused. The cache for it is the largest part of the memory after the "
    f"weights.  [default: {plan.LENGTH_DEFAULT}, or the model's own limit if that is lower]",
)
@click.option(
    "--max-num-seqs", type=click.IntRange(1), default=MAX_NUM_SEQS, show_default=True, help="Texts computed at once, at most."
)
@click.option(
    "--max-num-batched-tokens",
    type=click.IntRange(1),
    default=MAX_NUM_BATCHED_TOKENS,
    show_default=True,
    help="Tokens computed at once, at most; bounds the memory for activations.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="What to compute in. auto: float16 on a GPU; on a CPU bfloat16 if it has instructions for it, else float32.",
)
@click.option(
    "--token-table",
    type=click.Choice([INT8]),
    help="Turn the token table to INT8 while it is loaded: a quarter of float32, half of float16.  "
    "[default: as the checkpoint has it]",
)
@click.option(
    "--startup-timeout",
    type=click.FloatRange(1),
    default=STARTUP_TIMEOUT,
    show_default=True,
    help="Seconds that vLLM may take until it answers.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the line that says it is ready as a JSON object (memory in bytes)."
)
@click.option(
    "--verbose", is_flag=True, help="Show vLLM's log on stderr.  [default: shown only where it tells why vLLM failed]"
)
def command(int4: bool, model: str | None, as_json: bool, **limits: Any) -> None:
    """Serve a checkpoint through vLLM behind the OpenAI embeddings API.

    Prints one line when it answers, then runs until Ctrl-C or SIGTERM, which end everything it started.

    \b
    qembed serve --int4                         what `qembed quantize` made in this directory
    qembed serve --int4 --model ./FOLDER        an INT4 checkpoint elsewhere
    qembed serve --fp16 --model sample          the embedded sample, not quantized

    Exit codes: 0 stopped by Ctrl-C or SIGTERM while serving, 130 or 143 stopped by them while starting, 1 the port is
    taken, or vLLM did not start or died, 2 bad input, 3 vLLM is not installed.
    """  # noqa: D301 - click wants the real backspace character
    settings = Settings(checkpoint=_checkpoint(int4, model), **limits)
    stop = _Stop()
    serving = False
    try:
        with stop.on_signals(), _progress(settings.verbose) as report, engine.running(settings, report.say) as server:
            report.end()
            click.echo(_ready(server, as_json))
            serving = True
            server.watch()
    except KeyboardInterrupt:
        sys.exit(0 if serving else 128 + stop.signal)


def _checkpoint(int4: bool, model: str | None) -> checkpoints.Checkpoint:
    if int4:
        return checkpoints.find_int4(model)
    found = checkpoints.find(model) if model else _made_here() or checkpoints.find(checkpoints.DEFAULT_MODEL)
    return checkpoints.find(checkpoints.source_of(found)) if found.is_int4 else found


def _made_here() -> checkpoints.Checkpoint | None:
    try:
        return checkpoints.find_int4(None)
    except BadInput:
        return None


def _ready(server: engine.Server, as_json: bool) -> str:
    launch, memory = server.launch, server.memory()
    if as_json:
        return json.dumps(
            {
                "url": server.url,
                "model": server.model,
                "folder": str(launch.settings.checkpoint.folder),
                "int4": launch.settings.checkpoint.is_int4,
                "device": launch.device,
                "dtype": launch.dtype,
                "token_table": launch.token_table,
                "memory_bytes": memory,
                "weights_bytes": launch.plan.weights,
                "kv_cache_bytes": launch.plan.kv_cache,
                "max_model_len": launch.max_model_len,
                "pid": server.process.pid,
            }
        )
    kind = "INT4" if launch.settings.checkpoint.is_int4 else "not quantized"
    kind += ", INT8 token table" if launch.token_table == INT8 else ""
    return (
        f"{server.url}  model {server.model} ({kind})  device {launch.device} ({launch.dtype})  "
        f"memory {plan.gib(memory)} (weights {plan.gib(launch.plan.weights)}, cache up to {plan.gib(launch.plan.kv_cache)})"
    )


class _Stop:
    """Turns SIGTERM into KeyboardInterrupt, as Python does with SIGINT, and remembers which of them came."""

    signal: int = signal.SIGINT

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, _: object) -> NoReturn:
        self.signal = number
        raise KeyboardInterrupt


class _Progress:
    """A spinner on stderr that says what is being done; plain lines where stderr is no terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status = None if quiet or not self._console.is_terminal else self._console.status("starting")
        self._quiet = quiet
        self._start = time.monotonic()

    def say(self, doing: str) -> None:
        if self._status is not None:
            self._status.update(f"{doing} …")
            self._status.start()
        elif not self._quiet:
            self._console.print(f"{time.monotonic() - self._start:5.0f} s  {doing}", highlight=False)

    def end(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


@contextmanager
def _progress(quiet: bool) -> Iterator[_Progress]:
    progress = _Progress(quiet)
    try:
        yield progress
    finally:
        progress.end()
