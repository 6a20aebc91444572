"""`qembed serve`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qembed.checkpoint.find import find_served
from qembed.checkpoint.int8_table import INT8
from qembed.checkpoint.reranker import Task
from qembed.command.options import MODEL_HELP, Size, json_help, threads_option
from qembed.command.sections import section
from qembed.errors import BadInput
from qembed.serve.engine_command import show_command
from qembed.serve.json_log import JsonLogCommand
from qembed.serve.reporter import Reporter, show_plan
from qembed.serve.session import serve
from qembed.serve.startup_warnings import startup_warnings
from qembed.vllm import api_keys, devices, kernels, machine, plan, ports
from qembed.vllm.engine_options import parse as parse_engine_arg
from qembed.vllm.gate_rules import LONG_TEXTS
from qembed.vllm.settings import (
    CLIENT_TIMEOUT,
    HANG_TIMEOUT,
    HOST,
    KEEP_ALIVE,
    MAX_CLIENT_BATCH,
    MAX_CONNECTIONS,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    MAX_QUEUE,
    MAX_RESTARTS,
    MIN_HANG_TIMEOUT,
    PORT,
    SHUTDOWN_TIMEOUT,
    STARTUP_TIMEOUT,
    ServerSettings,
    resolve,
)

model, memory, limits, texts, network, operation = map(
    section, ("Model", "Memory", "Limits", "Texts", "Network and keys", "Timeouts, restarts and logs")
)
engine_options = section("Engine")


@click.command("serve", cls=JsonLogCommand)
@model(
    "--int4/--fp16", default=True, show_default=True, help="Serve the INT4 checkpoint, or the original that it was made from."
)
@model(
    "--model",
    envvar="QEMBED_MODEL",
    show_envvar=True,
    help=MODEL_HELP,
)
@model(
    "--task",
    type=click.Choice(["embed", "rerank"]),
    help="What the checkpoint is for, if its files do not tell.  [default: as its config, modules, chat template or name tell]",
)
@model("--served-model-name", help="Model name for requests.  [default: the name of the folder or hub model]")
@model(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype of the computation. auto: on a GPU bfloat16 if it has that (Ampere and later), otherwise float16; on a CPU the "
    "fastest for its instruction sets; --plan shows the choice and the reason.",
)
@memory(
    "--plan",
    "only_plan",
    is_flag=True,
    help="Print the memory plan and whether it fits, without starting anything. Exit code 1: it does not fit.",
)
@memory(
    "--device-memory",
    metavar="DEVICE",
    help=f"With --plan: plan for another device: {', '.join(devices.PRESETS)}, a GPU with so much memory (4GiB), or cpu:SIZE.",
)
@memory(
    "--memory",
    type=Size(),
    help="Total memory to use, such as 3GiB: chooses the longest context that fits, then the most sequences. Given values of "
    "--max-model-len, --max-num-seqs and --max-num-batched-tokens are kept.",
)
@memory(
    "--max-model-len",
    type=click.IntRange(1),
    help="Longest text, in tokens; longer ones get status 400.  [default: the model's max_seq_length, or what fits; with "
    f"--kv-cache {plan.LENGTH_WITH_CACHE}]",
)
@memory(
    "--max-num-seqs", type=click.IntRange(1), help=f"Maximum texts computed at once; others wait.  [default: {MAX_NUM_SEQS}]"
)
@memory(
    "--max-num-batched-tokens",
    type=click.IntRange(1),
    help="Maximum tokens computed at once; others wait, and a longer text is computed in pieces. Limits activations.  "
    f"[default: {MAX_NUM_BATCHED_TOKENS}]",
)
@memory(
    "--kv-cache/--no-kv-cache",
    default=False,
    show_default=True,
    help="Keep keys and values of all layers, so that vLLM can compute a text over several steps, and reuse common beginnings "
    "(--engine-arg enable-prefix-caching=true). Otherwise all layers share the memory for those of one layer.",
)
@memory(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "fp8"]),
    default="auto",
    show_default=True,
    help="auto: the dtype of the computation; fp8: half the size of 16 bits, on GPUs with FP8 (L4, H100, RTX 40 and later).",
)
@memory(
    "--token-table",
    type=click.Choice([INT8]),
    help="Convert the token table to INT8 while it loads: a quarter of float32, half of float16.  [default: as stored]",
)
@limits(
    "--max-queue",
    type=click.IntRange(1),
    default=MAX_QUEUE,
    show_default=True,
    help="Maximum texts waiting or being computed; a request beyond that gets status 503 with Retry-After. At least "
    "--max-client-batch.",
)
@limits(
    "--max-client-batch",
    type=click.IntRange(1),
    default=MAX_CLIENT_BATCH,
    show_default=True,
    help="Maximum texts in one request; more get status 400.",
)
@limits(
    "--max-body",
    type=Size(),
    default="32MiB",
    show_default=True,
    help="Maximum size of one request; larger ones get status 413.",
)
@texts(
    "--clean/--no-clean",
    default=True,
    show_default=True,
    help="Normalize texts to Unicode NFC, and remove control and zero-width characters.",
)
@texts(
    "--long-texts",
    type=click.Choice(LONG_TEXTS),
    help="Texts that are too long: status 400, cut at the end, or embedded in overlapping parts, whose mean, weighted by "
    "tokens, is the text's vector. A request may say otherwise.  [default: refuse]",
)
@texts("--truncate", is_flag=True, help="The same as --long-texts truncate.")
@texts(
    "--default-prompt",
    metavar="NAME",
    help="Name of the model's prompt for requests without one, such as query; '' for none.  [default: the model's "
    "default_prompt_name, which few have]",
)
@texts(
    "--prompt-names/--no-prompt-names",
    default=True,
    show_default=True,
    help="Answer to NAME-query, NAME-document and so on too, one name for each of the model's prompts, for programs that can "
    "set nothing but a name.",
)
@texts("--normalize", is_flag=True, help="Scale vectors to unit length, where the model has no Normalize module.")
@texts("--instruction", metavar="TEXT", help="A reranker's task for requests without one.  [default: that of the model card]")
@texts("--allow-token-ids", is_flag=True, help="Accept token ids of this model instead of texts.  [default: status 400]")
@network("--host", default=HOST, show_default=True, help="Address to listen on; 0.0.0.0 for all of this machine.")
@network(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="TCP port to listen on; 0 for a free one."
)
@network(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="API keys, one per line, KEY or NAME:KEY (names are for metrics and the access log); requests without one get status "
    "401. Read again when it changes, and on SIGHUP.  [default: QEMBED_API_KEY, separated by commas]",
)
@network(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Another name by which requests may call this server (Host header); * for any. Others get status 421, so that a web "
    "page cannot reach it through a name of its own.  [default: localhost and --host; with keys any]",
)
@network(
    "--keep-alive",
    type=click.IntRange(1),
    metavar="SECONDS",
    default=KEEP_ALIVE,
    show_default=True,
    help="How long an idle connection stays open; longer than a proxy in front keeps it.",
)
@network(
    "--client-timeout",
    type=click.FloatRange(1),
    metavar="SECONDS",
    default=CLIENT_TIMEOUT,
    show_default=True,
    help="How long a client may take to send a request's header, to send its body, and to take 64 KiB of an answer; then its "
    "connection is closed.",
)
@network(
    "--max-connections",
    type=click.IntRange(1),
    default=MAX_CONNECTIONS,
    show_default=True,
    help="Maximum open connections, or fewer as the limit of open files allows. A new one takes the place of one without a "
    "request; if all have one, it gets status 503.",
)
@network("--ssl-certfile", type=click.Path(exists=True, dir_okay=False), help="Certificate, for HTTPS.")
@network("--ssl-keyfile", type=click.Path(exists=True, dir_okay=False), help="Key of the certificate.")
@operation(
    "--startup-timeout",
    type=click.FloatRange(1),
    default=STARTUP_TIMEOUT,
    show_default=True,
    help="Seconds that the engine may take to start.",
)
@operation(
    "--shutdown-timeout",
    type=click.FloatRange(0),
    default=SHUTDOWN_TIMEOUT,
    show_default=True,
    help="Seconds to finish requests at SIGTERM or Ctrl-C; new ones get status 503.",
)
@operation(
    "--hang-timeout",
    type=click.FloatRange(0),
    default=HANG_TIMEOUT,
    show_default=True,
    help="Restart the engine if texts wait for so many seconds while nothing is computed, or if it does not answer for as "
    f"long; ten times as long while it keeps a core busy. At least {MIN_HANG_TIMEOUT:g}, or 0 for no limit.",
)
@operation(
    "--max-restarts",
    type=click.IntRange(0),
    default=MAX_RESTARTS,
    show_default=True,
    help="Maximum restarts in a row of an engine that ends or hangs.",
)
@operation(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Format of the log on stderr. json: all lines are JSON, on stdout too.",
)
@operation(
    "--access-log",
    is_flag=True,
    help="Log each request to stderr, without texts: id, method, path, status, seconds, texts, tokens, and the key's name.",
)
@operation(
    "--log-requests",
    is_flag=True,
    help="Log the texts of each request to stderr: the first 32, each cut to 1,000 characters.  [default: no texts]",
)
@operation("--verbose", is_flag=True, help="Show the engine's log on stderr.  [default: only the cause of a failure]")
@operation(
    "--json",
    "as_json",
    is_flag=True,
    help=json_help("one JSON object (the plan, the command, or the state when the server is ready; memory in bytes)"),
)
@engine_options(
    "--engine",
    type=click.Choice(["vllm", "sglang"]),
    default="vllm",
    show_default=True,
    help="sglang: serve the same checkpoint and limits with SGLang; texts are then not cleaned or checked.",
)
@threads_option(engine_options)
@engine_options("--tensor-parallel-size", type=click.IntRange(1), default=1, help="Devices that share one copy of the model.")
@engine_options("--data-parallel-size", type=click.IntRange(1), default=1, help="Devices with a full copy of the model each.")
@engine_options(
    "--engine-arg",
    "engine_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting of the engine, by the engine's name for it.",
)
@engine_options("--print-command", is_flag=True, help="Print the engine's command, ready to paste, without starting it.")
def command(
    int4: bool,
    model: str | None,
    task: Task | None,
    only_plan: bool,
    device_memory: str | None,
    api_key_file: Path | None,
    engine_args: tuple[str, ...],
    print_command: bool,
    as_json: bool,
    long_texts: str | None,
    truncate: bool,
    **options: Any,
) -> None:
    """Serve a checkpoint through vLLM behind the OpenAI embeddings API, or a Qwen3-Reranker behind /v1/rerank.

    Prints the memory plan, and one line when the server answers. Runs until Ctrl-C or SIGTERM, which stop all its processes.

    \b
    qembed serve --int4                         what `qembed quantize` wrote here
    qembed serve --int4 --model ./FOLDER        an INT4 checkpoint elsewhere
    qembed serve --fp16 --model sample          the embedded sample, not quantized
    qembed serve --plan --device-memory T4      the memory plan for a T4
    qembed serve --memory 3GiB                  the longest context that fits

    Exit codes: 0 stopped by Ctrl-C or SIGTERM while serving, 130 or 143 stopped by them while starting, 1 the port is
    taken, or vLLM did not start or died too often, 2 bad input, 3 vLLM is not installed.
    """  # noqa: D301 - click wants the real backspace character
    as_json = as_json or options["log_format"] == "json"
    if truncate and long_texts not in (None, "truncate"):
        raise BadInput(f"--truncate and --long-texts {long_texts} exclude each other")
    settings = ServerSettings(
        checkpoint=replace(find_served(int4, model), task=task),
        long_texts=long_texts or ("truncate" if truncate else "refuse"),
        keys=api_keys.named(api_key_file, os.environ),
        key_file=api_key_file,
        engine_args=tuple(map(parse_engine_arg, engine_args)),
        **options,
    )
    if 0 < settings.hang_timeout < MIN_HANG_TIMEOUT:
        raise BadInput(f"--hang-timeout {settings.hang_timeout:g}: at least {MIN_HANG_TIMEOUT:g} s, or 0 for no limit")
    if device_memory is not None and not only_plan:
        raise BadInput("--device-memory goes with --plan")
    if only_plan or print_command:
        target = devices.named(device_memory) if device_memory else machine.target()
        port = settings.port if only_plan or settings.port else ports.free(settings.host)
        launch = resolve(settings, target, kernels.this_cpu(), port)
        sys.exit(show_plan(launch, as_json) if only_plan else show_command(launch, as_json))
    reporter = Reporter(settings.log_format, quiet=settings.verbose and settings.log_format == "text")
    for warning in startup_warnings(settings, api_key_file):
        reporter.warn(warning)
    sys.exit(serve(settings, reporter, as_json))
