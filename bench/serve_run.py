"""A column of the bench: start a server, send it requests and end it, or run llama.cpp in its own process."""

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

from serve_load import Api, Load, LoadPeak, Peak, own_memory, rate, shared_memory
from serve_rows import AVX2, BUILD, LIMITS, LLAMA, ROOT, Row

from qembed.checkpoint.description import Checkpoint
from qembed.vllm import machine as host
from qembed.vllm import ports

START_SECONDS = 300
TURNS = 12
"""Requests to each server for each load, where they get requests in turns."""
SETTLED = 1.5
"""Seconds until a server that has answered leaves the cores to others: vLLM's workers poll for work for a second."""


def run_server(row: Row, loads: list[Load], say: Callable[[str], None]) -> dict[str, Any]:
    """Start the server of `row`, send it the requests of `loads`, end it."""
    say("starting")
    start = time.perf_counter()
    with LoadPeak() as loading, running(row) as up:
        api = Api(up.url, up.model)
        vectors = {load.name: api.ask(load.requests[0]) for load in loads[:1]}
        first = time.perf_counter() - start
        worker = worker_of(up.session)
        over = loading.end(worker)
        vectors |= {load.name: api.ask(load.requests[0]) for load in loads[1:]} if row.name != "bfloat16" else {}
        result: dict[str, Any] = {"first_seconds": first, "loaded_bytes": up.memory(), "rates": {}, "vectors": vectors}
        result["loading_bytes"] = over
        result["chosen"] = {name: up.ready[name] for name in ("dtype", "kernel", "kernel_reason") if name in up.ready}
        with Peak(up.memory) as peak:
            for load in loads:
                say(load.title)
                result["rates"][load.name] = rate(load, api.ask, warm=row.name != "bfloat16")
        result["busy_bytes"] = peak.bytes
    return result


def in_turns(rows: Sequence[Row], loads: list[Load], say: Callable[[str], None]) -> dict[str, Any]:
    """Run all of `rows` at once and send each request to one server after the other: seconds of each, by load and row.

    Other work of the machine then affects all of them alike, so ratios are more exact than between columns measured apart. The
    order is random: a server that always followed the same other would always find the caches and cores as that one left them.
    """
    order = random.Random(0)
    seconds: dict[str, dict[str, list[float]]] = {load.name: {row.name: [] for row in rows} for load in loads}
    with ExitStack() as up:
        askers = {}
        for row in rows:
            say(f"starting {row.name}")
            askers[row.name] = up.enter_context(asker(row, loads))
        for load in loads:
            say(load.title)
            for ask in askers.values():
                ask(load, 0)
            for turn in range(TURNS):
                for name in order.sample(list(askers), len(askers)):
                    time.sleep(SETTLED)
                    start = time.perf_counter()
                    askers[name](load, turn % len(load.requests))
                    seconds[load.name][name].append(time.perf_counter() - start)
    return {"seconds": seconds}


@contextmanager
def asker(row: Row, loads: list[Load]) -> Iterator[Callable[[Load, int], object]]:
    """Run `row`; call the yielded function with a load and the number of a request to send it."""
    if row.kind != "llama":
        with running(row) as up:
            # A new connection each time: servers close those that are idle during the others' turns.
            yield lambda load, number: Api(up.url, up.model).ask(load.requests[number])
        return
    with (BUILD / "turns.log").open("w") as log:
        process = subprocess.Popen(
            [*llama_command(row, loads), "--turns"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
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
    """A ready server: its URL, its model's name, its session, the JSON line of `qembed serve`, and the process started."""

    url: str
    model: str
    session: int
    ready: Mapping[str, Any]
    launcher: int

    def memory(self) -> int:
        """Bytes of all processes of the service (`shared_memory`)."""
        return shared_memory({self.launcher, *host.processes(self.session)})


@contextmanager
def running(row: Row) -> Iterator[Up]:
    """Run the server of `row` until the block is left."""
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
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start (log: {log.name})")
            ready = json.loads(line)
            yield Up(ready["url"], ready["model"], ready["pid"], ready, process.pid)
        else:
            url = f"http://127.0.0.1:{command[command.index('--port') + 1]}/v1"
            await_health(url, process, log.name)
            yield Up(url, "stock", process.pid, {}, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            for pid in host.processes(process.pid):
                os.kill(pid, signal.SIGKILL)
            log.close()


def stock(row: Row, environment: Mapping[str, str]) -> tuple[list[Any], dict[str, str]]:
    """Command and environment of a stock vLLM with our launcher's threads and cache, without compilation and prefix cache."""
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
    """The process with the model: the one of a server's processes with most memory."""
    return max(host.processes(session), key=own_memory)


def run_llama(row: Row, loads: list[Load], say: Callable[[str], None]) -> dict[str, Any]:
    """Embed the same tokens by llama.cpp in its own process."""
    say("llama.cpp")
    with (BUILD / f"{row.name}.log").open("w") as log:
        command = llama_command(row, loads)
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=True, timeout=600)
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def llama_command(row: Row, loads: list[Load]) -> list[str]:
    """The command of run_llama.py for `row`; writes the token ids of all requests to a file for it."""
    tokenizer = Checkpoint("float", BUILD / "float").tokenizer()
    requests = BUILD / "loads.json"
    ids = {load.name: [[tokenizer.encode(text).ids for text in texts] for texts in load.requests] for load in loads}
    requests.write_text(json.dumps(ids))
    return list(map(str, [LLAMA, ROOT / "bench" / "run_llama.py", BUILD / row.model, requests, len(host.cores())]))
