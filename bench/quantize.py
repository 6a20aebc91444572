"""Quality, speed and memory of INT4, ours and other tools': `make bench-quantize` or `python bench/quantize.py [--only ROW …]`.

Four tables go into bench/RESULTS.md: quality (the sample checkpoint; the same calibration texts and the same held-out texts
for every tool, and for ours without each of its parts), llm (the language model in the folder QEMBED_BENCH_LLM, on the lines of
the file QEMBED_BENCH_TEXTS; left out without them), speed and memory (checkpoints of random weights in real shapes).

Every row runs in its own process, and its numbers stay in build/bench/quantize/. A row whose command, versions and code have
not changed is not run again, so an interrupted bench resumes; `--only ROW` runs that row again, `--fresh` all of them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import language_model
import numpy as np
from numpy.typing import NDArray
from process import Failed, Run, run
from quantize_rows import (
    CALIBRATION_TEXTS,
    CHECK_TEXTS,
    CODE,
    ENVIRONMENTS,
    LLM,
    LLM_FOLDER,
    LLM_TEXTS,
    PACKAGES,
    ROOT,
    TABLES,
    Row,
)
from quantize_tables import publish, summary
from random_checkpoint import write as write_random
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import SAMPLE, find

BUILD = ROOT / "build" / "bench" / "quantize"
TOKEN_ROWS = BUILD / "token-rows.json"
console = Console()


def main() -> int:
    """Read the command line, run what is missing, write the tables; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for rows in TABLES.values() for row in rows]
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=names, help=f"run these rows again: {', '.join(names)}")
    parser.add_argument("--table", nargs="+", choices=list(TABLES), default=list(TABLES), help="tables to make [default: all]")
    parser.add_argument("--fresh", action="store_true", help="run every row again")
    parser.add_argument("--keep-models", action="store_true", help="keep the checkpoints of random weights (some GB)")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    failed = 0
    for table in arguments.table:
        rows = [row for row in TABLES[table] if not arguments.only or row.name in arguments.only]
        if table == "llm" and not (LLM_FOLDER.name and LLM_TEXTS.name):
            console.print("llm: left out, QEMBED_BENCH_LLM and QEMBED_BENCH_TEXTS name no model and no texts")
            continue
        for row in rows:
            failed += not make(row, anew=arguments.fresh or bool(arguments.only))
        if rows:
            publish(table, {row: numbers(row) for row in TABLES[table]})
    if not arguments.keep_models:
        shutil.rmtree(BUILD / "models", ignore_errors=True)
    return int(failed > 0)


def make(row: Row, *, anew: bool) -> bool:
    """Run `row` unless its numbers are on disk (`anew`: always) and store them. Returns whether it succeeded."""
    key, result = key_of(row), numbers(row)
    if not anew and result and result["key"] == key:
        console.print(f"{row.name}: {summary(result)}   (as before)", soft_wrap=True)
        return True
    place, out = BUILD / f"{row.name}.json", BUILD / "out" / row.name
    place.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    try:
        with working(row.name) as say:
            say("preparing")
            prepare(row)
            cost = run(command(row, out), BUILD / f"{row.name}.log", os.environ, say)
            result = {
                "key": key,
                "date": time.strftime("%Y-%m-%d"),
                "versions": versions(row.environment),
                **run_numbers(cost, out),
            }
            if row.model == SAMPLE:
                say("embedding the held-out texts")
                result |= fidelity(out)
            if row.model == LLM:
                say("asking both models")
                result |= language_model.measure(LLM_FOLDER, out, LLM_TEXTS)
    except Failed as error:
        console.print(f"[red]{row.name}: {error}[/red]", soft_wrap=True)
        return False
    place.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"{row.name}: {summary(result)}", soft_wrap=True)
    shutil.rmtree(out)
    return True


@contextmanager
def working(title: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with the elapsed time; call the yielded function with the current step, such as a child's last line."""
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title)

        def say(line: str) -> None:
            if line.strip():
                progress.update(task, description=f"{title}: {line.strip()}"[: console.width - 12])

        yield say


def numbers(row: Row) -> dict[str, Any] | None:
    """The stored numbers of `row`; None if it has not run."""
    place = BUILD / f"{row.name}.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None


def key_of(row: Row) -> str:
    """A hash of everything but the machine that determines the numbers of `row`: command, versions, code."""
    digest = hashlib.sha256(json.dumps([command(row, Path("out")), versions(row.environment)]).encode())
    for pattern in CODE[row.environment]:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def command(row: Row, out: Path) -> list[str]:
    """The command line of `row`, which writes the folder `out`."""
    executables = ENVIRONMENTS[row.environment]
    start = (
        [executables / "python", ROOT / "bench" / row.script] if row.script else [executables / "qembed", "quantize", "--json"]
    )
    model = model_folder(row) if row.model != SAMPLE else SAMPLE
    if row.environment == "auto-round":
        model = find(SAMPLE).folder
        start += ["--rows", TOKEN_ROWS]
    return [*map(str, start), "--model", str(model), "--output", str(out), *row.options]


def model_folder(row: Row) -> Path:
    """The checkpoint that `row` quantizes, if it is not the sample."""
    return LLM_FOLDER.resolve() if row.model == LLM else BUILD / "models" / row.model.replace(":", "-")


def prepare(row: Row) -> None:
    """Write what the command of `row` reads: a checkpoint of random weights, or our calibration as token rows."""
    if row.model not in (SAMPLE, LLM) and not (model_folder(row) / "config.json").exists():
        size, layers, vocabulary = [*row.model.split(":"), "0", "0"][:3]
        write_random(size, model_folder(row), int(layers) or None, vocabulary=int(vocabulary) or None)
    if row.environment == "auto-round":
        from qembed.quantize.calibration import built_in
        from qembed.quantize.cli import MAX_TOKENS, TOKEN_BUDGET

        calibration = built_in(find(SAMPLE), max_tokens=MAX_TOKENS, check=CHECK_TEXTS, seed=0, token_budget=TOKEN_BUDGET)
        used = [ids for number, ids in enumerate(calibration.rows) if number not in calibration.check]
        assert len(used) == CALIBRATION_TEXTS
        TOKEN_ROWS.write_text(json.dumps(used))


def run_numbers(cost: Run, out: Path) -> dict[str, Any]:
    """Numbers of a run and of its output; `layer_seconds` is the mean time of a layer, None if it reports too few."""
    from qembed.quantize.run import sizes

    reports = [(at, int(report[1])) for at, line in cost.lines if (report := re.match(r"layers: \d+%, (\d+) of \d+", line))]
    layers = reports[-1][1] - reports[0][1] if reports else 0
    checkpoint = Checkpoint(out.name, out)
    return {
        "seconds": cost.seconds,
        "peak_bytes": cost.peak_bytes,
        "layer_seconds": (reports[-1][0] - reports[0][0]) / layers if layers else None,
        "tensor_bytes": sizes(checkpoint)["all"],
        "tokens": checkpoint.manifest.get("calibration", {}).get("tokens"),
    }


@functools.cache
def versions(environment: str) -> dict[str, str]:
    """The versions of the relevant packages in an environment of ENVIRONMENTS."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    python = str(ENVIRONMENTS[environment] / "python")
    process = subprocess.run([python, "-c", code, *PACKAGES[environment]], check=True, capture_output=True, text=True)
    return dict(zip(PACKAGES[environment], process.stdout.split(), strict=True))


def fidelity(folder: Path) -> dict[str, Any]:
    """Mean and 99th percentile of 1 − cosine between the vectors of `folder` and the sample's, on the held-out texts.

    Both through transformers in float32; the same code dequantizes the weights of every tool.
    """
    from qembed.eval.fidelity import cosines
    from qembed.quantize.writer import copy_companions

    copy_companions(find(SAMPLE), folder)
    lost = 1 - cosines(vectors(folder), vectors(find(SAMPLE).folder))
    return {"texts": len(lost), "mean": float(lost.mean()), "p99": float(np.percentile(lost, 99))}


@functools.lru_cache(maxsize=2)
def vectors(folder: Path) -> NDArray[np.float32]:
    """Unit vectors of the held-out texts, queries with their prompts, from the checkpoint in `folder`."""
    from qembed.eval import texts
    from qembed.vectors import reference

    sample = find(SAMPLE)
    prompted = [text.model_input(sample.prompts, sample.embedder.document_prompt) for text in texts.read(texts.HELDOUT).texts]
    cut = texts.cut(prompted, sample.tokenizer(), sample.embedder.context).texts
    return reference.embed(reference.load(Checkpoint(folder.name, folder)), cut)


if __name__ == "__main__":
    raise SystemExit(main())
