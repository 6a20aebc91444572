"""INT4 compared with FP16 on an NVIDIA GPU: `make bench-gpu`. Runs unattended; needs no network if vLLM is installed.

A checkpoint of random weights in the shape of Qwen3-Embedding-0.6B is quantized on the device; then INT4 and FP16 are served in
turn with 2,048 tokens of context and 32 sequences. The tables have planned memory and what `nvidia-smi` counts, and tokens per
second, p50 and p99 for batches of 1, 8 and 64 texts of 43, 512 and 2,000 tokens. Without such a GPU the section says so, and
nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import results

from qembed.checkpoint.find import SAMPLE, find
from qembed.vllm import devices, machine

BUILD = Path(__file__).parents[1] / "build" / "bench" / "gpu"
CONTEXT, SEQUENCES = 2048, 32
BATCHES, LENGTHS = (1, 8, 64), (43, 512, 2000)
SECONDS = 8.0
LEAST = 5
TARGET = 1.6 * 2**30
SETTLE = 3.0
SAY = (
    "import torch, time; torch.zeros(1, device='cuda') @ torch.zeros(1, device='cuda'); print('up', flush=True); time.sleep(60)"
)


def text_of(tokens: int, count: Callable[[str], int]) -> str:
    """A text of exactly `tokens` tokens by `count`, including those that the model appends."""
    words = ["word"] * max(1, tokens)
    while count(" ".join(words)) > tokens and len(words) > 1:
        words.pop()
    text = " ".join(words)
    if count(text) != tokens:
        raise ValueError(f"no text of {tokens} tokens: {len(words)} words have {count(text)}")
    return text


def context_bytes() -> int | None:
    """Bytes of a CUDA context with torch and cuBLAS, measured with a process that allocates nothing else."""
    before = machine.cuda_total_used()
    with subprocess.Popen([sys.executable, "-c", SAY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(SETTLE)
        during = machine.cuda_total_used()
        process.kill()
    time.sleep(SETTLE)
    return None if before is None or during is None else during - before


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Run `qembed serve` of `folder`; yields its JSON line, and the bytes in use on the device before it started."""
    before = machine.cuda_total_used()
    limits = ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(SEQUENCES), "--max-client-batch", str(max(BATCHES))]
    command = [*QEMBED, "serve", f"--{kind}", "--model", str(folder), "--port", "0", "--json", *limits]
    with (BUILD / f"serve-{kind}.log").open("w") as log:
        server = subprocess.Popen([*command, "--verbose"], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise SystemExit(f"{kind}: the server did not start; see {BUILD / f'serve-{kind}.log'}")
            yield json.loads(line), before
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)


QEMBED = [sys.executable, "-c", "from qembed.cli import main; main()"]


def measure(kind: str, folder: Path, count: Callable[[str], int]) -> dict[str, Any]:
    """Memory and speed of one server."""
    import openai

    with serving(kind, folder) as (ready, before), openai.OpenAI(base_url=ready["url"], api_key="none", timeout=600) as client:
        speeds = {}
        for length in LENGTHS:
            text = text_of(length, count)
            for batch in BATCHES:
                client.embeddings.create(model=ready["model"], input=[text] * batch)
                seconds: list[float] = []
                while sum(seconds) < SECONDS or len(seconds) < LEAST:
                    start = time.monotonic()
                    client.embeddings.create(model=ready["model"], input=[text] * batch)
                    seconds.append(time.monotonic() - start)
                speeds[f"{length}x{batch}"] = {
                    "tokens_per_second": batch * length * len(seconds) / sum(seconds),
                    "p50": statistics.median(seconds),
                    "p99": sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1],
                }
                print(
                    f"{kind}  {length} tokens × {batch}: {speeds[f'{length}x{batch}']['tokens_per_second']:,.0f} tokens/s",
                    flush=True,
                )
        used, total = machine.cuda_used(machine.processes(ready["pid"])), machine.cuda_total_used()
        if used is None and total is not None and before is not None:
            used = total - before
        return {
            "plan": ready["plan"],
            "planned": ready["planned_bytes"],
            "at_start": ready["memory_bytes"],
            "used": used,
            "speeds": speeds,
        }


def quantize(source: Path, output: Path) -> float:
    """Seconds of `qembed quantize`."""
    shutil.rmtree(output, ignore_errors=True)
    start = time.monotonic()
    subprocess.run([*QEMBED, "quantize", "--model", str(source), "--output", str(output)], check=True)
    return time.monotonic() - start


def report(card: devices.Target, seconds: float, context: int | None, measured: dict[str, dict[str, Any]]) -> str:
    """The section of RESULTS.md."""
    memory = []
    for kind, numbers in measured.items():
        used = numbers["used"] or 0
        memory.append(
            [kind.upper(), *(_gib(size) for size in (numbers["planned"], numbers["at_start"], used, used - (context or 0)))]
        )
    speed = []
    for length in LENGTHS:
        for batch in BATCHES:
            cells = [f"{length} tokens × {batch}"]
            for numbers in measured.values():
                timing = numbers["speeds"][f"{length}x{batch}"]
                cells += [f"{timing['tokens_per_second']:,.0f}", f"{timing['p50'] * 1000:.1f}", f"{timing['p99'] * 1000:.1f}"]
            speed.append(cells)
    int4 = measured["int4"]["used"] or 0
    heads = [f"{kind.upper()} {unit}" for kind in measured for unit in ("tokens/s", "p50 ms", "p99 ms")]
    return "\n\n".join(
        (
            "## On a GPU (`make bench-gpu`)",
            f"{card.name}, {_gib(card.memory or 0)}; {date.today():%Y-%m-%d}. Random weights in the 0.6B's shape, "
            f"{CONTEXT} tokens of context, {SEQUENCES} sequences. Quantized on the device in {seconds:.0f} s. A CUDA context "
            f"with nothing in it takes {_gib(context or 0)}.",
            results.table(("memory on the device", "planned", "at start", "after the load", "without the context"), memory),
            f"Target for INT4, at most {_gib(int(TARGET))} in all: {'met' if 0 < int4 <= TARGET else 'missed'} ({_gib(int4)}).",
            results.table(("texts", *heads), speed),
        )
    )


def skipped(why: str) -> str:
    """The section of RESULTS.md where nothing was measured."""
    where = f"{date.today():%Y-%m-%d}, {results.machine()}"
    return f"## On a GPU (`make bench-gpu`)\n\nSkipped ({where}): {why}. Nothing was measured."


def no_gpu() -> str | None:
    """Why nothing can be measured here; None if it can."""
    card = machine.target()
    if card.kind != "cuda":
        return "no NVIDIA GPU, or no vLLM that could use it"
    try:
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    except ImportError:
        return "torch is not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, and write bench/RESULTS.md; a skipped run does not replace an existing table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results.FILE, help="where the table goes [default: bench/RESULTS.md]")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers, to try the bench itself")
    options = parser.parse_args(arguments)
    if (why := no_gpu()) is not None:
        print(f"bench-gpu: skipped: {why}")
        if not options.results.exists() or "memory on the device" not in options.results.read_text(encoding="utf-8"):
            results.replace_section("gpu", skipped(why), options.results)
        return
    from random_checkpoint import write

    BUILD.mkdir(parents=True, exist_ok=True)
    source, output = BUILD / "random-0.6B", BUILD / "random-0.6B-AWQ-INT4"
    if not (source / "config.json").exists():
        write("0.6B", source, options.layers)
    tokenizer = find(SAMPLE).tokenizer()
    count = lambda text: len(tokenizer.encode(text).ids)  # noqa: E731
    context = context_bytes()
    seconds = quantize(source, output)
    measured = {"int4": measure("int4", output, count), "fp16": measure("fp16", source, count)}
    body = report(machine.target(), seconds, context, measured)
    (BUILD / "results.json").write_text(json.dumps({"quantize_seconds": seconds, "context": context, **measured}, indent=2))
    print(body)
    results.replace_section("gpu", body, options.results)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
