"""Progress of a long command on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 30.0


class Reporter:
    """Shows how far a command is; what `update` is not given stays as it was."""

    def __init__(self, description: str) -> None:
        self.description, self.detail = description, ""
        self.fraction: float | None = None

    def update(self, description: str | None = None, fraction: float | None = None, detail: str | None = None) -> None:
        """Set what is being done, the share that is finished (0 to 1), and a detail such as counts and speed."""
        self.description = self.description if description is None else description
        self.fraction = self.fraction if fraction is None else fraction
        self.detail = self.detail if detail is None else detail
        self.show()

    def stage(self, description: str) -> None:
        """Begin a stage whose length is unknown."""
        self.fraction = None
        self.update(description, detail="")

    def steps(self, description: str, done: int, total: int, unit: str = "") -> None:
        """Set a stage of `total` steps, of which `done` are finished; `unit` names a step ("texts")."""
        self.update(description, done / total if total else None, f"{done:,} of {total:,} {unit}".rstrip())

    def show(self) -> None:
        """Show the present state."""


class LineReporter(Reporter):
    """Prints a line every SECONDS_BETWEEN_LINES seconds, none for a command that takes less."""

    def __init__(self, description: str, console: Console) -> None:
        super().__init__(description)
        self._console = console
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()

    def show(self) -> None:
        """Print a line if it is time for one."""
        with self._lock:
            moment = time.monotonic()
            if moment - self._last < SECONDS_BETWEEN_LINES:
                return
            self._last = moment
            share = "" if self.fraction is None else f"{self.fraction:.0%}"
            parts = [part for part in (share, self.detail, f"{moment - self._start:.0f} s") if part]
            self._console.print(f"{self.description}: {', '.join(parts)}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Print lines inside the block also while a step takes long and nothing calls `update`."""
        finished = threading.Event()

        def repeat() -> None:
            while not finished.wait(SECONDS_BETWEEN_LINES):
                self.show()

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


class BarReporter(Reporter):
    """Shows a bar with the share that is finished, and the time that is left of the stage."""

    def __init__(self, description: str, bar: Progress) -> None:
        super().__init__(description)
        self.bar = bar
        self._stage, self._task = description, bar.add_task(description, total=None, detail="")

    def show(self) -> None:
        """Show the present state."""
        if self.description != self._stage:  # the speed of one stage says nothing about the time that the next one takes
            self.bar.remove_task(self._task)
            self._stage, self._task = self.description, self.bar.add_task(self.description, total=None, detail="")
        total = None if self.fraction is None else 1.0
        self.bar.update(self._task, total=total, completed=self.fraction or 0.0, detail=self.detail)


@contextmanager
def reporter(description: str, console: Console) -> Iterator[Reporter]:
    """A reporter on `console` for the duration of the block."""
    if not console.is_terminal:
        lines = LineReporter(description, console)
        with lines.repeating():
            yield lines
        return
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    # rich would put itself in the place of sys.stderr and print what libraries write there, which belongs into their log.
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bar:
        yield BarReporter(description, bar)
