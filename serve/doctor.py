"""`qembed doctor`: the capabilities of this machine, and what each missing part is needed for."""

from __future__ import annotations

import os
import platform
import re
import resource
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from qembed.command.options import json_help
from qembed.errors import QembedError
from qembed.installation import how_to_install, packages
from qembed.text import strict_json

if TYPE_CHECKING:
    from qembed.vllm.kernels import Cpu

State = Literal["ok", "note", "fail"]
SIGNS: dict[State, str] = {"ok": "✔", "note": "·", "fail": "✘"}
STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "fail": "bold red"}
HUB_SECONDS = 2.0
SMALLEST_MEMORY = 2 * 2**30
"""Bytes: the 0.6B in INT4 with vLLM's processes needs about this much."""
FEWEST_FILES, USUAL_FILES = 128, 1024
"""With 64 open files vLLM does not start, with 128 it does; below 1,024 it has fewer connections than --max-connections."""
EXTRAS = {
    "parquet": (("pyarrow",), "Parquet files"),
    "docs": (("bs4", "markdown_it", "pypdf", "docx"), "PDF, DOCX, HTML and Markdown in `qembed embed`"),
    "search": (("faiss", "pyarrow"), "`qembed index` and `qembed search`"),
    "eval": (("faiss", "lightgbm", "sklearn"), "the tasks of `qembed eval`"),
    "mteb": (("mteb",), "`qembed eval --task mteb:NAME`"),
    "ray": (("ray",), "`qembed embed --ray`"),
}
"""Modules by extra, and what needs them."""


@dataclass(frozen=True)
class Check:
    """A line of the page: `state` "fail" means that the main job fails here, "note" that something is missing or limited."""

    name: str
    state: State
    value: str
    advice: str | None = None


@click.command("doctor")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The TCP port to look at.")
@click.option("--offline", is_flag=True, help="Do not ask whether the model hub answers (at most 2 s).")
@click.option("--json", "as_json", is_flag=True, help=json_help("one JSON object (`ok`, and a list of checks)"))
@click.pass_context
def command(ctx: click.Context, port: int, offline: bool, as_json: bool) -> None:
    """Show what this machine can do, and what is missing for each feature.

    Exit codes: 0 quantizing and serving work here, 1 they would fail.
    """
    checks = list(examine(port, ask_hub=not offline))
    works = all(check.state != "fail" for check in checks)
    if as_json:
        click.echo(strict_json.dumps({"ok": works, "checks": [asdict(check) for check in checks]}))
    else:
        show(checks)
    ctx.exit(0 if works else 1)


def examine(port: int, *, ask_hub: bool = True) -> Iterator[Check]:
    """All checks, in the order in which they are shown."""
    from qembed.vllm import kernels

    yield Check("system", "ok", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    cpu = kernels.this_cpu()
    has_avx2 = "avx2" in cpu.flags or platform.machine() not in ("x86_64", "AMD64")
    yield Check("CPU", "ok" if has_avx2 else "note", cpu.shown, None if has_avx2 else "vLLM's CPU build needs AVX2")
    yield gpu()
    yield requirements()
    yield vllm()
    yield kernel(cpu)
    yield memory()
    yield cores()
    yield open_files()
    yield free_port(port)
    if ask_hub:
        yield hub()
    yield cache()
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        advice = f"for {purpose}: {how_to_install(extra)}" if missing else None
        yield Check(
            f"extra {extra}", "note" if missing else "ok", f"no {', '.join(missing)}" if missing else "installed", advice
        )


def gpu() -> Check:
    """The first NVIDIA GPU, with its driver."""
    from qembed.sizes import gib
    from qembed.vllm import machine

    card = machine.first_gpu()
    if card is None:
        return Check("GPU", "ok", "none; everything runs on the CPU")
    version = machine.driver() or "unknown"
    size = "of unknown memory" if card.memory is None else gib(card.memory)
    return Check("GPU", "ok", f"{card.name}, {size}, driver {version}, compute capability {card.capability}")


def requirements() -> Check:
    """The packages that every command needs, such as torch; `pip install --no-deps` and later upgrades can break them."""
    problems = {line: problem for line in packages("") if (problem := _problem(line))}
    if not problems:
        return Check("packages", "ok", "all that qembed needs")
    return Check("packages", "fail", "; ".join(problems.values()), f"pip install {shlex.join(problems)}")


def _problem(requirement: str) -> str | None:
    """Why an installed package does not meet a requirement such as "torch>=2.6"; None if it does."""
    name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]
    if find_spec(name) is None:
        return f"no {name}"
    try:
        from packaging.requirements import Requirement

        version = metadata.version(name)
        fits = Requirement(requirement).specifier.contains(version, prereleases=True)
    except (ImportError, metadata.PackageNotFoundError):  # a package without its metadata may work
        return None
    return None if fits else f"{name} {version}, where {requirement} is needed"


def vllm() -> Check:
    """The installed vLLM, whether it was ever tried, and whether it has a device."""
    from qembed.vllm import internals, machine

    try:
        machine.check_vllm()
        machine.check_device()
    except QembedError as error:
        return Check(
            "vLLM",
            "fail",
            str(error).partition("; ")[0],
            f"on a GPU: {how_to_install('gpu')}; on a CPU: {how_to_install('cpu')}",
        )
    version, device = machine.vllm_version(), "a GPU" if machine.device() == "cuda" else "the CPU"
    untried = internals.untried(version)
    return Check("vLLM", "note" if untried else "ok", f"{version}, computes on {device}", untried)


def kernel(cpu: Cpu) -> Check:
    """What `qembed serve --int4` would compute with."""
    from qembed.vllm import kernels, machine

    if find_spec("vllm") is not None and machine.device() == "cuda":
        return Check("INT4", "ok", "vLLM's kernels for GPUs, in float16 or bfloat16")
    choice = kernels.choose(cpu, int4=True)
    advice = None if cpu.compiled else "install a C++ compiler (Debian: apt-get install g++), then build qembed again"
    return Check("INT4", "ok" if cpu.compiled else "note", f"{choice.title}: {choice.reason}", advice)


def memory() -> Check:
    """Main memory, or the limit of the container."""
    from qembed import cgroup
    from qembed.sizes import gib
    from qembed.vllm import machine

    host = machine.host()
    if host.memory is None or host.free is None:
        return Check("memory", "note", "unknown")
    limited = " (limit of the control group)" if cgroup.memory() is not None else ""
    free, address_space = host.free, resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= address_space < free:
        free, limited = address_space, f"{limited} (limit of the address space: ulimit -v)"
    enough = free >= SMALLEST_MEMORY
    advice = None if enough else "Qwen3-Embedding-0.6B in INT4 needs about 2 GiB; see `qembed serve --plan` for other models"
    return Check("memory", "ok" if enough else "fail", f"{gib(free)} free of {gib(host.memory)}{limited}", advice)


def cores() -> Check:
    """Physical cores that may be used, and what limits them."""
    from qembed import cgroup
    from qembed.vllm import machine

    quota = cgroup.cpus()
    limit = "" if quota is None else f", CPU quota {quota:g}"
    return Check("cores", "ok", f"{len(machine.cores())} used of {os.cpu_count()} logical CPUs{limit}")


def open_files() -> Check:
    """How many files and connections a process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shown = "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,} at once"
    if limit == resource.RLIM_INFINITY or limit >= USUAL_FILES:
        return Check("open files", "ok", shown)
    return Check("open files", "fail" if limit < FEWEST_FILES else "note", shown, "raise the limit: ulimit -n 4096")


def free_port(port: int) -> Check:
    """Whether a server could listen on `port` of this machine."""
    from qembed.vllm import ports

    try:
        ports.listen("127.0.0.1", port).close()
    except QembedError as error:
        return Check("port", "note", str(error).partition("; ")[0], "serve with --port 0, or another one")
    return Check("port", "ok", f"{port} is free")


def hub() -> Check:
    """Whether the model hub answers."""
    from qembed.client import http

    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    advice = "models come from folders or the hub's cache; --model sample needs neither"
    if offline:
        return Check("hub", "note", "HF_HUB_OFFLINE is set", advice)
    try:
        http.request(url, timeout=HUB_SECONDS, largest=1024)
    except (OSError, ValueError, HTTPException) as error:
        return Check("hub", "note", f"{url} does not answer ({getattr(error, 'reason', None) or error})", advice)
    return Check("hub", "ok", f"{url} answers")


def cache() -> Check:
    """Whether the folder of computed vectors can be written."""
    from qembed.vectors.cache import default_folder

    try:
        folder: Path = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check("cache", "ok", str(folder))
    except (OSError, RuntimeError) as error:  # no home folder at all is a RuntimeError
        return Check("cache", "note", f"cannot be written: {error}", "name another folder with --cache, or XDG_CACHE_HOME")


def show(checks: list[Check]) -> None:
    """Print the page."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        advice = f"\n[dim]{escape(check.advice)}[/dim]" if check.advice else ""
        sign = f"[{STYLES[check.state]}]{SIGNS[check.state]}[/]"
        table.add_row(sign, check.name, f"{escape(check.value)}{advice}")
    Console(highlight=False).print(table)
