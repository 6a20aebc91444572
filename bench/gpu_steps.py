"""A step of a piece of gpu.py, and how steps are run, stored and continued."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import gpu_report

from qembed.errors import QembedError

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "bench" / "gpu"


class LeftOut(Exception):
    """A step has nothing to measure on this device; the message says why."""


@dataclass(frozen=True)
class Setup:
    """Where and on what a piece runs.

    Attributes:
        device: "cuda" or "cpu". On a CPU everything is a rehearsal on the sample.
        build: a folder for checkpoints and logs.
    """

    device: str
    build: Path = BUILD

    @property
    def is_rehearsal(self) -> bool:
        """Whether this only tries the script."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Step:
    """A measurement. It is started only while at least `seconds` are left."""

    name: str
    seconds: float
    measure: Callable[[Setup], Mapping[str, Any]]


def run(
    todo: Sequence[Step],
    file: Path,
    setup: Setup,
    where: Mapping[str, Any],
    seconds: float,
    clock: Callable[[], float],
    *,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Run the steps (`only` those named) that `file` has no numbers of, while `seconds` last; returns what `file` then holds.

    A step that fails leaves its error there, and is repeated the next time. Numbers of another machine are put aside.
    """
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if record and record["where"] != where:
        file.rename(file.with_name(f"{file.stem}-{record['date']}.json"))
        record = {}
    record = {"where": dict(where), "date": f"{date.today():%Y-%m-%d}", "steps": record.get("steps", {})}
    end = clock() + seconds
    order = [step.name for step in todo]  # that of the tables
    for step in (step for step in todo if only is None or step.name in only):
        if "error" not in record["steps"].get(step.name, {"error": "not measured"}):
            print(f"{step.name}: measured already", flush=True)
            continue
        if (left := end - clock()) < step.seconds:
            print(f"{step.name}: not started: {left:.0f} s are left, it may need {step.seconds:.0f} s", flush=True)
            continue
        print(f"{step.name}: …", flush=True)
        begin = clock()
        try:
            numbers = dict(step.measure(setup))
        except LeftOut as reason:
            numbers = {"left_out": str(reason)}
        except (QembedError, subprocess.SubprocessError, OSError, ValueError, LookupError, RuntimeError, ImportError) as error:
            numbers = {"error": f"{type(error).__name__}: {error}"[:2000]}
        record["steps"][step.name] = {**numbers, "seconds_taken": round(clock() - begin, 1)}
        record["steps"] = {name: record["steps"][name] for name in sorted(record["steps"], key=order.index)}
        print(f"{step.name}: {json.dumps(record['steps'][step.name])}", flush=True)
        write(record, file)
    return record


def write(record: Mapping[str, Any], file: Path) -> None:
    """Replace `file` by `record` as JSON, and the section beside it by its table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((file, json.dumps(record, indent=1)), (file.with_suffix(".md"), gpu_report.section(file.stem, record))):
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
