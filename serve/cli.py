"""`qembed serve`."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from qembed.checkpoint.find import find_served
from qembed.checkpoint.int8_table import INT8
from qembed.command.options import MODEL_HELP, Size
from qembed.command.sections import SectionedCommand, section
from qembed.command.signals import Interrupts
from qembed.errors import BadInput, QembedError
from qembed.serve.reporter import Reporter, computing, how, notes, verdict
from qembed.sizes import gib
from qembed.vllm import api_keys, devices, kernels, log, machine, plan, plan_table, ports, sglang, supervisor
from qembed.vllm.arguments import environment, rules
from qembed.vllm.engine_options import parse as parse_engine_arg
from qembed.vllm.gate_rules import VARIABLE
from qembed.vllm.settings import (
    HANG_TIMEOUT,
    HOST,
    LOCAL,
    MAX_CLIENT_BATCH,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    MAX_QUEUE,
    MAX_RESTARTS,
    PORT,
    SHUTDOWN_TIMEOUT,
    STARTUP_TIMEOUT,
    Launch,
    ServerSettings,
    resolve,
)

model, memory, limits, texts, network, life = map(
    section, ("Model", "Memory", "Limits", "Texts", "Network and keys", "Life and logs")
)
engine_options = section("Engine")


@click.command("serve", cls=SectionedCommand)
@model("--int4/--fp16", default=True, show_default=True, help="Serve the INT4 checkpoint, or the original it came from.")
@model(
    "--model",
    envvar="QEMBED_MODEL",
    show_envvar=True,
    help=MODEL_HELP,
)
@model("--served-model-name", help="Model name that requests must give.  [default: the name of the folder or hub model]")
@model(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="What to compute in. auto: float16 on a GPU; on a CPU what is fastest by its instructions and the kernels that there "
    "are, which --plan tells with the reason.",
)
@memory(
    "--plan",
    "only_plan",
    is_flag=True,
    help="Print where every byte would go, and whether it fits, and start nothing. Exit code 1: it does not fit.",
)
@memory(
    "--device-memory",
    metavar="DEVICE",
    help=f"With --plan: a device that is not at hand: {', '.join(devices.PRESETS)}, a GPU of a size (4GiB), or cpu:SIZE.",
)
@memory(
    "--memory",
    type=Size(),
    help="All that may be taken, as 3GiB: chooses the longest context that fits, then the most sequences; --max-model-len, "
    "--max-num-seqs and --max-num-batched-tokens stay where they are given.",
)
@memory(
    "--max-model-len",
    type=click.IntRange(1),
    help=f"Longest text, in tokens; longer ones get status 400. Its cache is the largest part of the memory after "
    f"the weights.  [default: {plan.LENGTH_DEFAULT}, or the model's own limit if that is lower]",
)
@memory(
    "--max-num-seqs", type=click.IntRange(1), help=f"Texts computed at once, at most; more wait.  [default: {MAX_NUM_SEQS}]"
)
@memory(
    "--max-num-batched-tokens",
    type=click.IntRange(1),
    help=f"Tokens computed at once, at most; more wait. Bounds activations.  [default: {MAX_NUM_BATCHED_TOKENS}]",
)
@memory(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "fp8"]),
    default="auto",
    show_default=True,
    help="auto: as computed in; fp8: half of 16 bits, on GPUs that have it (L4, H100, RTX 40 and later).",
)
@memory(
    "--token-table",
    type=click.Choice([INT8]),
    help="Turn the token table to INT8 while it is loaded: a quarter of float32, half of float16.  "
    "[default: as the checkpoint has it]",
)
@limits(
    "--max-queue",
    type=click.IntRange(1),
    default=MAX_QUEUE,
    show_default=True,
    help="Texts waiting and being computed, at most; a request beyond gets status 503 with Retry-After. Not below "
    "--max-client-batch.",
)
@limits(
    "--max-client-batch",
    type=click.IntRange(1),
    default=MAX_CLIENT_BATCH,
    show_default=True,
    help="Texts in one request, at most; more get status 400.",
)
@limits(
    "--max-body", type=Size(), default="32MiB", show_default=True, help="Size of one request, at most; more gets status 413."
)
@texts(
    "--clean/--no-clean",
    default=True,
    show_default=True,
    help="Turn texts to Unicode NFC, and take control and zero-width characters out.",
)
@texts("--truncate", is_flag=True, help="Cut texts that are too long.  [default: status 400, unless the request says so]")
@texts("--default-prompt", metavar="NAME", help="The model's prompt for requests that name none, such as query.")
@texts("--allow-token-ids", is_flag=True, help="Take token ids of this model in place of texts.  [default: status 400]")
@network("--host", default=HOST, show_default=True, help="Address to listen on; 0.0.0.0 is every one of this machine.")
@network(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="TCP port to listen on; 0 takes a free one."
)
@network(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="API keys, one a line; requests without one of them get status 401.  [default: QEMBED_API_KEY, commas between keys]",
)
@network("--ssl-certfile", type=click.Path(exists=True, dir_okay=False), help="Certificate, for HTTPS.")
@network("--ssl-keyfile", type=click.Path(exists=True, dir_okay=False), help="Its key.")
@life(
    "--startup-timeout",
    type=click.FloatRange(1),
    default=STARTUP_TIMEOUT,
    show_default=True,
    help="Seconds that the engine may take until it answers.",
)
@life(
    "--shutdown-timeout",
    type=click.FloatRange(0),
    default=SHUTDOWN_TIMEOUT,
    show_default=True,
    help="Seconds that requests which are being computed have left at SIGTERM or Ctrl-C; new ones get status 503.",
)
@life(
    "--hang-timeout",
    type=click.FloatRange(0),
    default=HANG_TIMEOUT,
    show_default=True,
    help="Seconds that texts may wait while nothing is computed, or that the server may take to answer at all, until the "
    "engine counts as hung and is started again; ten times as long while it keeps a core busy. 0: no limit.",
)
@life(
    "--max-restarts",
    type=click.IntRange(0),
    default=MAX_RESTARTS,
    show_default=True,
    help="How often in a row the engine is started again when it ends or hangs.",
)
@life("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="What goes to stderr.")
@life("--log-requests", is_flag=True, help="Write the texts of each request to stderr.  [default: no text is logged]")
@life("--verbose", is_flag=True, help="Show the engine's log on stderr.  [default: shown only where it tells why it failed]")
@life("--json", "as_json", is_flag=True, help="Print the plan, or the line that says it is ready, as JSON (memory in bytes).")
@engine_options(
    "--engine",
    type=click.Choice(["vllm", "sglang"]),
    default="vllm",
    show_default=True,
    help="sglang: the same checkpoint and limits where SGLang is installed; texts are then not cleaned or checked.",
)
@engine_options("--tensor-parallel-size", type=click.IntRange(1), default=1, help="Devices that share one model.")
@engine_options("--data-parallel-size", type=click.IntRange(1), default=1, help="Devices that have a whole model each.")
@engine_options(
    "--engine-arg", "engine_args", multiple=True, metavar="KEY=VALUE", help="Any other setting of the engine, by its own name."
)
@engine_options("--print-command", is_flag=True, help="Print the command that would be run, ready to paste, and start nothing.")
def command(
    int4: bool,
    model: str | None,
    only_plan: bool,
    device_memory: str | None,
    api_key_file: Path | None,
    engine_args: tuple[str, ...],
    print_command: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Serve a checkpoint through vLLM behind the OpenAI embeddings API.

    Prints where the memory goes and one line when it answers, then runs until Ctrl-C or SIGTERM, which end everything it
    started.

    \b
    qembed serve --int4                         what `qembed quantize` wrote here
    qembed serve --int4 --model ./FOLDER        an INT4 checkpoint elsewhere
    qembed serve --fp16 --model sample          the embedded sample, not quantized
    qembed serve --plan --device-memory T4      where every byte would go
    qembed serve --memory 3GiB                  the longest context that fits

    Exit codes: 0 stopped by Ctrl-C or SIGTERM while serving, 130 or 143 stopped by them while starting, 1 the port is
    taken, or vLLM did not start or died too often, 2 bad input, 3 vLLM is not installed.
    """  # noqa: D301 - click wants the real backspace character
    settings = ServerSettings(
        checkpoint=find_served(int4, model),
        keys=api_keys.find(api_key_file, os.environ),
        engine_args=tuple(map(parse_engine_arg, engine_args)),
        **asked,
    )
    if device_memory is not None and not only_plan:
        raise BadInput("--device-memory goes with --plan")
    if only_plan or print_command:
        target = devices.named(device_memory) if device_memory else machine.target()
        port = settings.port if only_plan or settings.port else ports.free(settings.host)
        launch = resolve(settings, target, kernels.this_cpu(), port)
        sys.exit(_show_plan(launch, as_json) if only_plan else _show_command(launch))
    voice = Reporter(settings.log_format, quiet=settings.verbose and settings.log_format == "text")
    for warning in _warnings(settings, api_key_file):
        voice.warn(warning)
    interrupts = Interrupts()
    serving = False
    try:
        with interrupts.raised(), voice, supervisor.running(settings, voice.stage, voice.show_plan) as server:
            voice.end()
            measured = server.measured()
            click.echo(_ready(server, measured, as_json))
            if measured:
                voice.measured(server.launch, measured)
            serving = True
            server.watch(voice.stage, voice.warn)
    except KeyboardInterrupt:
        sys.exit(0 if serving else 128 + interrupts.signal)
    except QembedError as error:
        if settings.log_format != "json":
            raise
        log.event(str(error), "error")
        sys.exit(error.exit_code)


def _show_plan(launch: Launch, as_json: bool) -> int:
    """Print the plan; the exit code."""
    target = launch.target
    fits = target.free is None or launch.needed <= target.free
    if as_json:
        sizes = dataclasses.asdict(launch.sizes) | computing(launch)
        click.echo(json.dumps(plan_table.as_json(launch.plan, target, sizes, launch.needed)))
        return 0 if fits else 1
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(plan_table.render(launch.plan, target, notes(launch)))
    console.print(how(launch))
    console.print(verdict(launch))
    return 0 if fits else 1


def _show_command(launch: Launch) -> int:
    if launch.settings.engine == "sglang":
        sglang.check_settings(launch.settings)
        variables: dict[str, str] = {}
    else:
        given = environment(launch, os.environ, machine.cores())
        variables = {name: value for name, value in given.items() if os.environ.get(name) != value}
        variables[VARIABLE] = rules(launch, secrets.token_urlsafe(), 0).dump().decode().strip()
    words = [f"{name}={value}" for name, value in variables.items()]
    click.echo(shlex.join([*(["env", *words] if words else []), *supervisor.command(launch)]))
    return 0


def _warnings(settings: ServerSettings, key_file: Path | None) -> Iterator[str]:
    if settings.host not in LOCAL and not settings.keys:
        yield f"everybody who reaches {settings.host or 'this machine'} can use this server: no key is set (--api-key-file)"
    if settings.keys and settings.host not in LOCAL and settings.ssl_certfile is None:
        yield "keys and texts go over the network unencrypted: no --ssl-certfile; put a proxy with TLS before it, or give one"
    if key_file is not None and api_keys.is_exposed(key_file):
        yield f"{key_file}: every user of this machine may read the keys in it; chmod 600 {key_file}"
    if settings.engine == "sglang":
        yield f"with SGLang {sglang.ABSENT}"


def _ready(server: supervisor.Server, measured: Mapping[str, int], as_json: bool) -> str:
    launch, used = server.launch, measured.get("total", server.launch.plan.total)
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
                "memory_bytes": used,
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
        f"{server.url}  model {server.model} ({kind})  device {launch.device} ({launch.choice.title})  "
        f"memory {gib(used)} (planned {gib(launch.plan.total)}: weights {gib(launch.plan.weights)}, "
        f"cache {gib(launch.plan.kv_cache)})"
    )
