"""A step of a piece of gpu.py, and how steps are run, stored and continued."""

from __future__ import annotations

import fcntl
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import gpu_report

from qembed.errors import QembedError

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "bench" / "gpu"
PATIENCE = 90.0
"""Seconds that a step waits for the others to be ready; one of them may hang."""
LOCK = Path(tempfile.gettempdir(), "qembed-bench-gpu.lock")


class LeftOut(Exception):
    """A step has nothing to measure on this device; the message says why."""


class Turns:
    """Steps that run at once: they prepare themselves beside each other, and measure alone, in turn, once all are ready."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._preparing, self._waiting, self._changed = set(names), list(names), threading.Condition()

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait until all steps are ready and those before `name` have ended, and keep the others waiting inside the block."""
        with self._changed:
            self._preparing.discard(name)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._preparing and (name not in self._waiting or self._waiting[0] == name), PATIENCE
            )
        try:
            with LOCK.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may measure another piece
                yield
        finally:
            self.end(name)

    def end(self, name: str) -> None:
        """The step `name` has measured, or failed."""
        with self._changed:
            self._preparing.discard(name)
            if name in self._waiting:
                self._waiting.remove(name)
            self._changed.notify_all()


@dataclass(frozen=True)
class Setup:
    """Where and on what a piece runs.

    Attributes:
        device: "cuda" or "cpu". On a CPU everything is a rehearsal on the sample.
        build: a folder for checkpoints and logs.
        turns: the steps that run at once.
    """

    device: str
    build: Path = BUILD
    turns: Turns = field(default_factory=Turns, compare=False)

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
    at_once: bool = False,
) -> dict[str, Any]:
    """Run the steps (`only` those named) that `file` has no numbers of, while `seconds` last; returns what `file` then holds.

    A step that fails leaves its error there, and is repeated the next time. Numbers of another machine are put aside. With
    `at_once` all steps start together, and those that measure inside `Setup.turns.alone` do so in turn.
    """
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if record and record["where"] != where:
        file.rename(file.with_name(f"{file.stem}-{record['date']}.json"))
        record = {}
    record = {"where": dict(where), "date": f"{date.today():%Y-%m-%d}", "steps": record.get("steps", {})}
    end, writing = clock() + seconds, threading.Lock()

    def measure(step: Step) -> None:
        if (left := end - clock()) < step.seconds:
            setup.turns.end(step.name)
            print(f"{step.name}: not started: {left:.0f} s are left, it may need {step.seconds:.0f} s", flush=True)
            return
        print(f"{step.name}: …", flush=True)
        begin = clock()
        try:
            numbers = dict(step.measure(setup))
        except LeftOut as reason:
            numbers = {"left_out": str(reason)}
        except (QembedError, subprocess.SubprocessError, OSError, ValueError, LookupError, RuntimeError, ImportError) as error:
            numbers = {"error": f"{type(error).__name__}: {error}"[:2000]}
        finally:
            setup.turns.end(step.name)
        with writing:
            record["steps"][step.name] = {**numbers, "seconds_taken": round(clock() - begin, 1)}
            print(f"{step.name}: {json.dumps(record['steps'][step.name])}", flush=True)
            write(record, file)

    missing = []
    for step in (step for step in todo if only is None or step.name in only):
        if "error" in record["steps"].get(step.name, {"error": "not measured"}):
            missing.append(step)
        else:
            print(f"{step.name}: measured already", flush=True)
    if at_once and missing:
        setup = replace(setup, turns=Turns([step.name for step in missing]))
        with ThreadPoolExecutor(len(missing)) as pool:
            list(pool.map(measure, missing))
    else:
        for step in missing:
            measure(step)
    order = [step.name for step in todo]  # that of the tables
    record["steps"] = {name: record["steps"][name] for name in sorted(record["steps"], key=order.index)}
    write(record, file)
    return record


def write(record: Mapping[str, Any], file: Path) -> None:
    """Replace `file` by `record` as JSON, and the section beside it by its table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((file, json.dumps(record, indent=1)), (file.with_suffix(".md"), gpu_report.section(file.stem, record))):
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
