"""One column of the bench: a server that is started, asked and ended, or llama.cpp in a process of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from serve_load import Api, Load, LoadPeak, Peak, own_memory, rate
from serve_rows import AVX2, BUILD, LIMITS, LLAMA, ROOT, Row

from qembed.checkpoint.description import Checkpoint
from qembed.vllm import machine as host
from qembed.vllm import ports

START_SECONDS = 300
TURNS = 12
"""How often each server is asked for each load, where they are asked in turns."""
SETTLED = 1.5
"""Seconds after which a server that has answered leaves the cores to others: vLLM's workers look for work for a second."""


def run_server(row: Row, asked: list[Load], say: Callable[[str], None]) -> dict[str, Any]:
    """Start the server of `row`, ask it, end it."""
    say("starting")
    start = time.perf_counter()
    with LoadPeak() as loading, running(row) as up:
        api = Api(up.url, up.model)
        vectors = {load.name: api.ask(load.requests[0]) for load in asked[:1]}
        first = time.perf_counter() - start
        worker = worker_of(up.session)
        over = loading.end(worker)
        vectors |= {load.name: api.ask(load.requests[0]) for load in asked[1:]} if row.name != "bfloat16" else {}
        found: dict[str, Any] = {"first_seconds": first, "loaded_bytes": own_memory(worker), "rates": {}, "vectors": vectors}
        found["loading_bytes"] = over
        found["chosen"] = {name: up.ready[name] for name in ("dtype", "kernel", "kernel_reason") if name in up.ready}
        with Peak(worker) as peak:
            for load in asked:
                say(load.title)
                found["rates"][load.name] = rate(load, api.ask, warm=row.name != "bfloat16")
        found["busy_bytes"] = peak.bytes
    return found


def in_turns(rows: Sequence[Row], asked: list[Load], say: Callable[[str], None]) -> dict[str, Any]:
    """All of `rows` at once, each request sent to one after the other: seconds of each, by load and row.

    What a machine does meanwhile hits all alike, so their ratios are sharper than those of columns that were measured apart.
    The order is another one each time: whoever always follows the same server finds the caches and cores as that one left them.
    """
    order = random.Random(0)
    found: dict[str, dict[str, list[float]]] = {load.name: {row.name: [] for row in rows} for load in asked}
    with ExitStack() as up:
        askers = {}
        for row in rows:
            say(f"starting {row.name}")
            askers[row.name] = up.enter_context(asker(row, asked))
        for load in asked:
            say(load.title)
            for ask in askers.values():
                ask(load, 0)
            for turn in range(TURNS):
                for name in order.sample(list(askers), len(askers)):
                    time.sleep(SETTLED)
                    start = time.perf_counter()
                    askers[name](load, turn % len(load.requests))
                    found[load.name][name].append(time.perf_counter() - start)
    return {"seconds": found}


@contextmanager
def asker(row: Row, asked: list[Load]) -> Iterator[Callable[[Load, int], object]]:
    """What asks the running `row` for the request of a load with a number."""
    if row.kind != "llama":
        with running(row) as up:
            # A connection each time: servers close those that are idle while the others have their turn.
            yield lambda load, number: Api(up.url, up.model).ask(load.requests[number])
        return
    with (BUILD / "turns.log").open("w") as log:
        process = subprocess.Popen(
            [*llama_command(row, asked), "--turns"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        to, answers = process.stdin, process.stdout

        def ask(load: Load, number: int) -> object:
            to.write(json.dumps([load.name, number]) + "\n")
            to.flush()
            return answers.readline() or fail()

        def fail() -> object:
            raise RuntimeError(f"llama.cpp ended (log: {log.name})")

        try:
            yield ask
        finally:
            process.kill()
            process.wait()


class Up(NamedTuple):
    """A server that answers: its URL, its model's name, its session, and what `qembed serve` said when it was ready."""

    url: str
    model: str
    session: int
    ready: Mapping[str, Any]


@contextmanager
def running(row: Row) -> Iterator[Up]:
    """The server of `row`, until the block is left."""
    environment = {**os.environ, **({"PYTHONPATH": str(AVX2)} if row.avx2 else {})}
    folder = BUILD / row.model
    log = (BUILD / f"{row.name}.log").open("w")
    if row.kind == "qembed":
        limits = [word for pair in LIMITS.items() for word in pair]
        command = [Path(sys.executable).parent / "qembed", "serve", "--model", folder, "--port", "0", "--json", "--verbose"]
        command += [*limits, *row.options]
    else:
        command, environment = stock(row, environment)
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        if row.kind == "qembed":
            said = process.stdout.readline()
            if not said:
                raise RuntimeError(f"the server did not start (log: {log.name})")
            ready = json.loads(said)
            yield Up(ready["url"], ready["model"], ready["pid"], ready)
        else:
            url = f"http://127.0.0.1:{command[command.index('--port') + 1]}/v1"
            await_health(url, process, log.name)
            yield Up(url, "stock", process.pid, {})
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            for pid in host.processes(process.pid):
                os.kill(pid, signal.SIGKILL)
            log.close()


def stock(row: Row, environment: Mapping[str, str]) -> tuple[list[Any], dict[str, str]]:
    """vLLM as it comes, with the settings that our launcher gives it: threads, cache, no compilation, no prefix cache."""
    options = {
        "--model": BUILD / row.model,
        "--served-model-name": "stock",
        "--host": "127.0.0.1",
        "--port": ports.free("127.0.0.1"),
        "--runner": "pooling",
        "--convert": "embed",
        "--kv-cache-memory-bytes": kv_cache(),
        "--block-size": 32,
        **LIMITS,
    }
    cores = ",".join(map(str, host.cores()))
    chosen = {
        **environment,
        "VLLM_PLUGINS": "",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    server += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    return [*server, "--disable-uvicorn-access-log", *[word for pair in options.items() for word in pair], *row.options], chosen


def kv_cache() -> int:
    """Bytes of the KV cache that stock vLLM gets: what our launcher plans for one, in float32."""
    from qembed.vllm.devices import Target
    from qembed.vllm.kernels import Cpu
    from qembed.vllm.settings import ServerSettings, resolve

    checkpoint = Checkpoint("float", BUILD / "float")
    sizes: dict[str, Any] = {name[2:].replace("-", "_"): int(size) for name, size in LIMITS.items()}
    settings = ServerSettings(checkpoint, dtype="float32", kv_cache=True, **sizes)
    return resolve(settings, Target("cpu", "", None, None), Cpu(), 1).plan.kv_cache


def await_health(url: str, process: subprocess.Popen[str], log: str) -> None:
    """Wait until the server says that it is ready."""
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
        if process.poll() is not None:
            break
    raise RuntimeError(f"the server did not start (log: {log})")


def worker_of(session: int) -> int:
    """The process that holds the model: of a server's processes the one with most memory."""
    return max(host.processes(session), key=own_memory)


def run_llama(row: Row, asked: list[Load], say: Callable[[str], None]) -> dict[str, Any]:
    """Let llama.cpp embed the same tokens in a process of its own."""
    say("llama.cpp")
    with (BUILD / f"{row.name}.log").open("w") as log:
        done = subprocess.run(llama_command(row, asked), stdout=subprocess.PIPE, stderr=log, text=True, check=True, timeout=600)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def llama_command(row: Row, asked: list[Load]) -> list[str]:
    """run_llama.py for `row`, with the token ids of all requests written for it."""
    tokenizer = Checkpoint("float", BUILD / "float").tokenizer()
    requests = BUILD / "loads.json"
    ids = {load.name: [[tokenizer.encode(text).ids for text in texts] for texts in load.requests] for load in asked}
    requests.write_text(json.dumps(ids))
    return list(map(str, [LLAMA, ROOT / "bench" / "run_llama.py", BUILD / row.model, requests, len(host.cores())]))
