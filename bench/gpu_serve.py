"""The pieces "serve" and "together" of gpu.py: memory and speed of `qembed serve` on a GPU."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpu_quantize import PLUGIN_TESTS, random_int4, source, tests
from gpu_steps import Setup, Step
from gpu_variants import VARIANTS, Variant, check, loaded, on

from qembed.checkpoint.find import SAMPLE, find
from qembed.vllm import machine

SIZE = "0.6B"
BATCHES, LENGTHS = (1, 8, 32, 256), (43, 512, 2048)
FEW = ((8, 43), (32, 512))
"""Batches and lengths for variants: one where weights count, one where arithmetic does."""
SECONDS, LEAST = 1.5, 3
CONTEXT, LONG_CONTEXT = 2048, 8192
PAIR_LIMIT = 4 * 2**30
PAIRS, PAIR_WORDS = 8, 40
"""Documents of a reranker's request, and words in each."""
FLOOD_CLIENTS = 64
CONTEXT_ALONE = (
    "import torch, time; torch.zeros(1, device='cuda') @ torch.zeros(1, device='cuda'); print('up', flush=True); time.sleep(60)"
)
LOG_LINES = {
    "weights": r"Model loading took ([\d.]+) GiB",
    "graphs": r"Graph capturing finished in \d+ secs, took (-?[\d.]+) GiB",
}
"""Lines of vLLM's log with GiB of a line of the plan."""


def text_of(tokens: int, count: Callable[[str], int]) -> str:
    """A text of exactly `tokens` tokens by `count`, including those that the model appends."""
    words = ["word"] * max(1, tokens)
    while count(" ".join(words)) > tokens and len(words) > 1:
        words.pop()
    text = " ".join(words)
    if count(text) != tokens:
        raise ValueError(f"no text of {tokens} tokens: {len(words)} words have {count(text)}")
    return text


@contextmanager
def serving(
    setup: Setup, folder: Path, *options: str, name: str, variant: Variant = VARIANTS["int4"]
) -> Iterator[dict[str, Any]]:
    """Run `qembed serve` of `folder` as `variant`, with further `options`.

    Yields its JSON line with `log`, and `used_before`: bytes in use on the device before.

    Raises:
        RuntimeError: the server did not start; the message has the end of its log.
    """
    before = machine.cuda_total_used()
    command = [sys.executable, "-m", "qembed", "serve", "--int4" if variant.int4 else "--fp16", "--model", str(folder)]
    command += ["--port", "0", "--json", "--verbose", *options, *variant.options]
    log = setup.build / f"serve-{name}.log"
    with log.open("w") as file:
        begin = time.monotonic()
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, **variant.variables}
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise RuntimeError(f"{name}: the server did not start: …{log.read_text(errors='replace')[-1500:]}")
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']}")
            yield {**answer, "log": log, "used_before": before, "start_seconds": time.monotonic() - begin}
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def limits(setup: Setup, context: int = CONTEXT) -> list[str]:
    """Options for `context` tokens and 32 sequences. In a rehearsal all is smaller, so that a long text still takes pieces."""
    if setup.is_rehearsal:
        return ["--max-model-len", str(min(context, 512)), "--max-num-seqs", "8", "--max-num-batched-tokens", "128"]
    return ["--max-model-len", str(context), "--max-num-seqs", "32"]


def post(ready: Mapping[str, Any], texts: Sequence[str], timeout: float = 120) -> tuple[int, bytes]:
    """Status and body of an embeddings request."""
    return send(ready, "/v1/embeddings", {"input": list(texts), "encoding_format": "base64"}, timeout)


def send(ready: Mapping[str, Any], path: str, request: Mapping[str, Any], timeout: float) -> tuple[int, bytes]:
    """Status and body of the answer to `request`, which gets the model's name."""
    parts = urlsplit(ready["url"])
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps({"model": ready["model"], **request}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def vectors(ready: Mapping[str, Any], texts: Sequence[str]) -> list[bytes]:
    """The float32 vectors of `texts`, as bytes.

    Raises:
        RuntimeError: the status is not 200.
    """
    status, body = post(ready, texts)
    if status != 200:
        raise RuntimeError(f"status {status}: {body[:300]!r}")
    return [base64.b64decode(item["embedding"]) for item in json.loads(body)["data"]]


def speeds(setup: Setup, ready: Mapping[str, Any], cells: Sequence[tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Tokens per second and seconds per request of each (texts, tokens) of `cells`."""
    tokenizer = find(SAMPLE).tokenizer()
    measured = {}
    for batch, length in [(batch, min(length, 256)) for batch, length in cells] if setup.is_rehearsal else cells:
        text = text_of(length, lambda text: len(tokenizer.encode(text).ids))
        vectors(ready, [text] * batch)
        seconds: list[float] = []
        while len(seconds) < LEAST or (sum(seconds) < SECONDS and not setup.is_rehearsal):
            begin = time.monotonic()
            vectors(ready, [text] * batch)
            seconds.append(time.monotonic() - begin)
        measured[f"{batch}x{length}"] = {
            "tokens_per_second": round(batch * length * len(seconds) / sum(seconds), 1),
            "p50": round(statistics.median(seconds), 5),
            "p99": round(sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1], 5),
        }
    return measured


def memory(ready: Mapping[str, Any]) -> dict[str, Any]:
    """Planned and used bytes: of the device in all, of the server, and by the lines of vLLM's log."""
    total, before = machine.cuda_total_used(), ready["used_before"]
    used = machine.cuda_used(machine.processes(ready["pid"]))
    if used is None:
        used = ready["memory_bytes"] if total is None or before is None else total - before
    log = ready["log"].read_text(errors="replace")
    lines = {name: int(float(matches[-1]) * 2**30) for name, line in LOG_LINES.items() if (matches := re.findall(line, log))}
    numbers = {"plan": ready["plan"], "planned": ready["planned_bytes"], "used": used, "device_total": total, "log": lines}
    return {**numbers, "loaded": loaded(log), "start_seconds": round(ready["start_seconds"], 1)}


def server(name: str, seconds: float, context: int = CONTEXT, cells: Sequence[tuple[int, int]] = FEW) -> Step:
    """Memory and speed of the variant `name`."""

    def measure(setup: Setup) -> Mapping[str, Any]:
        variant = on(setup, name)
        folder = random_int4(SIZE, setup) if variant.int4 else source(SIZE, setup)
        with serving(setup, folder, *limits(setup, context), name=name, variant=variant) as ready:
            check(name, variant, loaded(ready["log"].read_text(errors="replace")))
            measured = speeds(setup, ready, cells[:2] if setup.is_rehearsal else cells)
            longest = text_of(ready["max_model_len"], lambda text: len(find(SAMPLE).tokenizer().encode(text).ids))
            vectors(ready, [longest] * (1 if setup.is_rehearsal else 4))
            return {**memory(ready), "context": ready["max_model_len"], "speeds": measured}

    return Step(name, seconds, measure)


def context(setup: Setup) -> Mapping[str, Any]:
    """Bytes of a CUDA context with torch and cuBLAS, measured with a process that allocates nothing else."""
    if setup.is_rehearsal:
        return {"context": None}
    before = machine.cuda_total_used()
    with subprocess.Popen([sys.executable, "-c", CONTEXT_ALONE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used, total = machine.cuda_used([process.pid]), machine.cuda_total_used()
        process.kill()
    if used is None and before is not None and total is not None:  # in a container
        used = total - before
    return {"context": used}


def flood_and_kill(setup: Setup) -> Mapping[str, Any]:
    """More texts than the queue takes, then SIGKILL of the engine: statuses, and seconds until vectors come again."""
    queue = 16 if setup.is_rehearsal else 256
    options = [*limits(setup), "--max-queue", str(queue), "--max-client-batch", "8"]
    with serving(setup, random_int4(SIZE, setup), *options, name="flood") as ready:
        statuses: Counter[str] = Counter()
        end = time.monotonic() + (3 if setup.is_rehearsal else 10)

        def client() -> None:
            while time.monotonic() < end:
                try:
                    statuses[str(post(ready, ["word " * 200] * 8)[0])] += 1
                except (OSError, http.client.HTTPException):
                    statuses["cut"] += 1

        clients = [threading.Thread(target=client) for _ in range(FLOOD_CLIENTS)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        engine = max(machine.processes(ready["pid"]), key=_resident)
        begin = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if post(ready, ["music"], 5)[0] == 200 and time.monotonic() - begin > 1:
                    break
            if time.monotonic() - begin > 150:
                raise RuntimeError(f"no vectors 150 s after SIGKILL; statuses before: {dict(statuses)}")
            time.sleep(0.2)
        return {"queue": queue, "statuses": dict(statuses), "restart_seconds": round(time.monotonic() - begin, 1)}


def _resident(pid: int) -> int:
    """Resident bytes of a process: of a server's, the one with the engine has the most."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return 0


def pairs_per_second(ready: Mapping[str, Any], is_over: Callable[[], bool]) -> float:
    """The speed of a reranker with requests of PAIRS documents, one after another until `is_over`, and at least one.

    Raises:
        RuntimeError: the status is not 200.
    """
    request = {"query": "where do swifts sleep", "documents": [f"{number} {'word ' * PAIR_WORDS}" for number in range(PAIRS)]}
    count, begin = 0, time.monotonic()
    while not count or not is_over():
        status, body = send(ready, "/v1/rerank", request, 120)
        if status != 200 or len(json.loads(body)["results"]) != PAIRS:
            raise RuntimeError(f"status {status}: {body[:300]!r}")
        count += PAIRS
    return round(count / (time.monotonic() - begin), 1)


def pair(setup: Setup) -> Mapping[str, Any]:
    """An embedder and a reranker of this shape in INT4 on one device, each with half of 4 GiB."""
    half = f"{PAIR_LIMIT // 2**21}MiB"
    options = ["--memory", half] if not setup.is_rehearsal else limits(setup)
    before = machine.cuda_total_used()
    with ExitStack() as stack:
        folders = {name: random_int4(SIZE, setup, reranker=name == "reranker") for name in ("embedder", "reranker")}
        servers = [serving(setup, folder, *options, name=f"pair-{name}") for name, folder in folders.items()]
        with ThreadPoolExecutor(len(servers)) as starting:
            ready = list(starting.map(stack.enter_context, servers))
        alone, pairs_alone = speeds(setup, ready[0], FEW[:1]), pairs_per_second(ready[1], _after(SECONDS))
        with ThreadPoolExecutor(1) as other:
            over = threading.Event()
            scored = other.submit(pairs_per_second, ready[1], over.is_set)
            try:
                beside = speeds(setup, ready[0], FEW[:1])
            finally:
                over.set()
            pairs_beside = scored.result()
        used, total = [machine.cuda_used(machine.processes(line["pid"])) for line in ready], machine.cuda_total_used()
        if None in used:  # in a container
            used = [line["memory_bytes"] for line in ready] if total is None or before is None else [total - before]
        return {
            "limit": PAIR_LIMIT,
            "planned": sum(line["planned_bytes"] for line in ready),
            "used": sum(bytes_used or 0 for bytes_used in used),
            "context": [line["max_model_len"] for line in ready],
            "alone": alone,
            "beside": beside,
            "pairs_per_second": {"alone": pairs_alone, "beside": pairs_beside},
        }


def _after(seconds: float) -> Callable[[], bool]:
    """A function that tells whether `seconds` have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


ALL = [(batch, length) for length in LENGTHS for batch in BATCHES]
STEPS = (
    Step("context", 20, context),
    server("int4", 110, cells=ALL),
    server("fp16", 110, cells=ALL),
    server("int4 by Marlin", 90, cells=ALL),
    Step("flood", 120, flood_and_kill),
    server("int4, 8k context", 80, LONG_CONTEXT),
    server("int4, INT8 table", 80),
    server("int4, float16", 80),
    server("int4, fp8 keys and values", 80),
    tests(PLUGIN_TESTS),
)
PAIR_STEPS = (Step("pair", 120, pair),)
