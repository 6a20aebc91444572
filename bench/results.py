"""Sections of bench/RESULTS.md: each bench replaces the text between its own two markers."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

FILE = Path(__file__).parent / "RESULTS.md"
HEAD = "# Measurements\n\nEach section names the command that writes it.\n"


def replace_section(name: str, body: str, file: Path = FILE) -> None:
    """Put `body` between the markers of section `name`, at the end of `file` if it has no such section yet."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n\n{body.strip()}\n\n{end}"
    text = file.read_text(encoding="utf-8") if file.exists() else HEAD
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    changed, count = pattern.subn(lambda _: section, text)
    file.write_text(changed if count else f"{text.rstrip()}\n\n{section}\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are aligned to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """The processor, its cores, the memory and the system, in one line."""
    model = next(
        iter(re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model.strip()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"
