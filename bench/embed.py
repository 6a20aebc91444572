"""Throughput of `qembed embed` compared with the engine alone, and its memory by number of rows: `make bench-embed`.

Throughput: a vLLM with an INT4 model first gets all token ids, sorted by length, in a single call of its own API: the upper
bound. Then `qembed embed` runs with the same vLLM: reading, cleaning, tokenizing, windows, Parquet. The two take turns. The
models are the 0.6B's shape with random weights, and the sample, which is so small that all other work weighs most.

Memory: as above, with an engine that computes nothing (`embed_tiny.py`), so that rows are measured and not the model; each
size in its own process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import results
from serve_models import write_int4

from qembed.checkpoint.find import find
from qembed.embed import engine, inputs
from qembed.embed.job import Job
from qembed.embed.run import run
from qembed.embed.windows import Texts
from qembed.eval.texts import HELDOUT
from qembed.vllm.settings import ServerSettings

BUILD = Path(__file__).parents[1] / "build" / "bench" / "embed"
SERVE = BUILD.parent / "serve"
SHAPES = {"short texts": (4, 12), "paragraphs": (40, 160)}
"""Words per text: least and most."""
PARAGRAPHS = 8
"""Short texts per paragraph."""


def main() -> None:
    """Run, print, and write bench/RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--texts", type=int, nargs=2, default=(6000, 480), metavar=("SAMPLE", "0.6B"),
        help="short texts a turn for each of the models, 0 for none; paragraphs an eighth [default: 6000 480]",
    )  # fmt: skip
    parser.add_argument("--turns", type=int, default=3, help="[default: 3]")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000, 10_000_000], help="of the memory table"
    )
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "TEXTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if arguments.measure:
        rows = in_turns(Path(arguments.measure[0]), int(arguments.measure[1]), arguments.turns)
        print(json.dumps(rows))
        return
    where = f"{results.machine()}; {date.today():%Y-%m-%d}."
    sample, large = arguments.texts
    if sample or large:
        body = throughput(where, sample, large, arguments.turns)
        print(body)
        results.replace_section("embed throughput", body)
    if arguments.rows:
        body = memory(where, arguments.rows)
        print(body)
        results.replace_section("embed memory", body)


def throughput(where: str, for_sample: int, for_large: int, turns: int) -> str:
    """The section of the table of tokens per second, each model in a separate process."""
    rows = []
    for title, model, count in (("the sample", _int4, for_sample), ("the 0.6B's shape", _large, for_large)):
        if count:
            command = [sys.executable, str(Path(__file__)), "--measure", str(model()), str(count), "--turns", str(turns)]
            process = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            rows += [[title, *row] for row in json.loads(process.stdout.splitlines()[-1])]
    columns = ("INT4", "texts", "vLLM by hand, tokens/s", "`qembed embed`, tokens/s", "ratio")
    how = f"{turns} turns each, medians; without vLLM's start."
    return f"## `qembed embed` compared with the engine (`make bench-embed`)\n\n{where} {how}\n\n{results.table(columns, rows)}"


def in_turns(model: Path, count: int, turns: int) -> list[list[str]]:
    """The rows of the table for one model."""
    launch = engine.plan_launch(ServerSettings(find(str(model))))
    tokenizer = launch.settings.checkpoint.tokenizer()
    rows = []
    with engine.opened(launch, None, lambda _: None) as opened:
        assert isinstance(opened, engine.InProcess)
        for name, (least, most) in SHAPES.items():
            texts = _texts(count if name == "short texts" else count // PARAGRAPHS, least, most)
            path = BUILD / "in.txt"
            path.write_text("\n".join(texts))
            ids = sorted((encoding.ids for encoding in tokenizer.encode_batch_fast(texts)), key=len, reverse=True)
            tokens = sum(map(len, ids))
            opened.vectors(ids[: len(ids) // 10])
            job = Job(
                inputs.find(str(path), None, "lines"),
                BUILD / "out.parquet",
                Texts(tokenizer, launch.max_model_len),
                lambda: nullcontext(opened),
                force=True,
            )
            by_hand, own = [], []
            for _ in range(turns):
                start = time.monotonic()
                opened.vectors(ids)
                by_hand.append(tokens / (time.monotonic() - start))
                start = time.monotonic()
                run(job)
                own.append(tokens / (time.monotonic() - start))
            ratio = statistics.median(ours / theirs for ours, theirs in zip(own, by_hand, strict=True))
            medians = [f"{statistics.median(speeds):,.0f}" for speeds in (by_hand, own)]
            rows.append([f"{len(texts):,} {name} of {tokens / len(texts):.0f} tokens", *medians, f"{ratio:.3f}"])
    return rows


def memory(where: str, sizes: list[int]) -> str:
    """The section of the table of memory by rows."""
    rows = []
    for count in sizes:
        path = BUILD / "rows.txt"
        with path.open("w") as file:
            for number in range(count):
                file.write(f"text {number}{' word' * (number % 5)}\n")
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("embed_tiny.py")), str(path), str(BUILD / "tiny.parquet")],
            stdout=subprocess.PIPE,
            check=True,
        )
        result: dict[str, Any] = json.loads(process.stdout)
        assert result["vectors"] == count
        print(f"{count} rows: {result}", file=sys.stderr, flush=True)
        size = path.stat().st_size + (BUILD / "tiny.parquet").stat().st_size
        speed = count / result["seconds"]
        peak = result["peak"] / 2**10
        rows.append([f"{count:,}", f"{peak:.0f}", f"{result['seconds']:.0f}", f"{speed:,.0f}", f"{size / 1e6:,.0f}"])
        path.unlink()
        (BUILD / "tiny.parquet").unlink()
    columns = ("rows", "peak memory, MiB", "seconds", "rows/s", "input and output, MB")
    how = "Reading, cleaning, tokenizing, windows and Parquet are real; the engine only writes 16 numbers per text."
    return f"## Memory of `qembed embed` by rows (`make bench-embed`)\n\n{where} {how}\n\n{results.table(columns, rows)}"


def _large() -> Path:
    """The 0.6B's shape in INT4, as for `make bench-serve`."""
    return write_int4(SERVE, lambda doing: print(doing, file=sys.stderr))


def _int4() -> Path:
    folder = BUILD / "sample-AWQ-INT4"
    if not (folder / "config.json").exists():
        qembed = str(Path(sys.executable).parent / "qembed")
        subprocess.run([qembed, "quantize", "--model", "sample", "--output", str(folder)], check=True)
    return folder


def _texts(count: int, least: int, most: int) -> list[str]:
    """Texts of random words of the held-out texts."""
    words = [word for line in HELDOUT.read_text(encoding="utf-8").splitlines() for word in json.loads(line)["text"].split()]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(least, most))) for _ in range(count)]


if __name__ == "__main__":
    main()
