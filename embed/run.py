"""Runs a job: reads ahead, computes, and writes in the background. An interrupted run can be resumed."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import itertools
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qembed.checkpoint.vocabulary import failed, is_panic
from qembed.embed import formats, journal, spool
from qembed.embed.inputs import Inputs
from qembed.embed.job import Job, settings_of
from qembed.embed.journal import Done, Journal
from qembed.embed.outputs import CHUNK_COLUMNS, IDS, REJECTS
from qembed.embed.readers import Reading
from qembed.embed.spool import Spool
from qembed.embed.windows import Window, windows
from qembed.embed.writer import OnProgress, Writer, computed
from qembed.errors import BadInput, QembedError
from qembed.files import appearing, sync_folder, sync_path
from qembed.own_files import start_anew
from qembed.targets import already_exists, check_targets

OnNote = Callable[[str], None]
NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
REJECTED = 4
"""Exit code of a run that is whole, and has rejected rows."""


@dataclass(frozen=True)
class Finished:
    """The outcome: total counts, and how many vectors an earlier run had already finished."""

    done: Done
    dimensions: int
    resumed: int
    rejects: Path | None
    ids: Path | None
    seconds: float


def check(job: Job) -> None:
    """Check that the output can be written, before anything is loaded.

    Raises:
        BadInput: it exists, its folder does not, or the format cannot hold what is requested.
        MissingExtra: Parquet without pyarrow.
    """
    formats.kind(job.output, job.dtype)
    taken = {"id", "vector", *(CHUNK_COLUMNS if job.texts.chunk_tokens else ())}
    for name in job.keep:
        if name in taken:
            raise BadInput(f"--keep {name}: the output has a column of that name of its own")
    if not (job.partial / journal.NAME).exists():
        _check_targets(job)


def _check_targets(job: Job) -> None:
    """Check that no file that the job writes is one that it reads, or one that is there and must stay."""
    inputs = [*job.replaced, *(file.path for file in job.inputs.files)]
    check_targets([job.target(name) for name in reversed(job.targets)], inputs, force=job.force)


def run(job: Job, on_progress: OnProgress = lambda _: None, on_note: OnNote = lambda _: None) -> Finished:
    """Run the job, or the rest of an interrupted one. `on_note` is called with what the readers decided, such as a delimiter.

    Raises:
        BadInput: the input or the options cannot be used; with `strict`, a row cannot.
        QembedError: the engine failed, or the disk is full; finished work is kept.
    """
    check(job)
    began = time.monotonic()
    with on_disk(job), journal.opened(job.partial, settings_of(job), job.force) as kept:
        before = kept.done
        journal.check_sizes(job.partial, before, job.targets)
        if not isinstance(kept.notes.get("dimensions", None if before.windows else 1), int):
            raise BadInput(f"{job.partial / journal.NAME}: damaged; {start_anew(job.partial)}")
        if not before.ended:
            _check_targets(job)
            try:
                journal.claim(job.partial, list(job.targets.values()))
                _compute(job, kept, on_progress, on_note)
            except BaseException:
                if not kept.done.windows and not any((job.partial / name).exists() for name in spool.FILES):
                    journal.remove(job.partial)
                raise
        dimensions = int(kept.notes["dimensions"])
        _put_in_place(job, kept)
        journal.remove(job.partial)
    targets = job.targets
    rejects = targets[REJECTS] if kept.done.rejected else None
    return Finished(kept.done, dimensions, before.vectors, rejects, targets.get(IDS), time.monotonic() - began)


def _compute(job: Job, kept: Journal, on_progress: OnProgress, on_note: OnNote) -> None:
    """Embed window after window until the input ends."""
    reading = Reading(job.inputs, job.text_column, job.id_column, job.keep, job.rows, on_note)
    with _ahead(_windows(job, reading, kept.done)) as coming:
        first = next(coming, None)
        if first is None and not kept.done.windows:
            raise BadInput(f"{_name(job.inputs)}: holds no texts")
        if first is None:
            # All windows were written, and the run ended before it could say so.
            with Writer(job, kept, kept.notes["dimensions"], on_progress) as writing:
                writing.finish()
            return
        with job.engine() as engine:
            if kept.notes.get("dimensions") not in (None, engine.dimensions):
                raise BadInput(f"vectors have {engine.dimensions} numbers now, and had {kept.notes['dimensions']} before")
            if "dimensions" not in kept.notes:
                kept.note("dimensions", engine.dimensions)
            with Writer(job, kept, engine.dimensions, on_progress) as writing:
                batches = Spool(job.partial)
                for window in itertools.chain([first], coming):
                    writing.begin(window)
                    writing.put(window, computed(window, engine, batches, writing.tell))
                writing.finish()


def _windows(job: Job, reading: Reading, start: Done) -> Iterator[Window]:
    for window in windows(reading.rows(), job.texts, start.mark, start.windows):
        window.done = min(1.0, reading.done / reading.total) if reading.total else 0.0
        if job.strict and window.rejects:
            first = window.rejects[0]
            raise BadInput(f"{first.place}: {first.reason} (--strict)")
        yield window


def _put_in_place(job: Job, kept: Journal) -> None:
    """Rename the files to their final names. Can be repeated after an interruption."""
    done, targets = kept.done, job.targets
    missing = [name for name in targets if (job.partial / name).exists() and not (name == REJECTS and not done.rejected)]
    for name in missing:
        target = job.target(name)
        check_targets([target], [file.path for file in job.inputs.files], force=True)
        if not job.force and target.path.exists() and not filecmp.cmp(job.partial / name, target.path, shallow=False):
            raise BadInput(f"{already_exists(target.path, target.option)}; it was not there when the run began")
    if not done.rejected and job.force and targets[REJECTS].is_file():
        targets[REJECTS].unlink()
    for name in missing:
        _move(job.partial / name, targets[name])
    sync_folder(job.output.parent)


def _move(source: Path, target: Path) -> None:
    """Rename; copy to another file system (only --rejects can name one)."""
    try:
        source.replace(target)
    except OSError:
        if source.stat().st_dev == target.parent.stat().st_dev:
            raise
        with appearing(target) as temporary:
            shutil.copyfile(source, temporary)
            sync_path(temporary)


@contextlib.contextmanager
def _ahead(made: Iterator[Window]) -> Iterator[Iterator[Window]]:
    """The windows, each read while the previous one is computed. A reading error is raised after the windows before it."""
    waiting: queue.Queue[Window | BaseException | None] = queue.Queue(1)
    stop = threading.Event()

    def read() -> None:
        last: BaseException | None = None
        try:
            for window in made:
                if not _put(waiting, window, stop):
                    return
        except BaseException as error:  # noqa: BLE001 - it is raised where the windows are taken
            last = BadInput(failed(error, "--model")) if is_panic(error) else error
        _put(waiting, last, stop)

    def taken() -> Iterator[Window]:
        while (window := waiting.get()) is not None:
            if isinstance(window, BaseException):
                raise window
            yield window

    threading.Thread(target=read, name="reader", daemon=True).start()
    try:
        yield taken()
    finally:
        stop.set()


def _put(waiting: queue.Queue[Any], value: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            waiting.put(value, timeout=0.2)
            return True
    return False


@contextlib.contextmanager
def on_disk(job: Job) -> Iterator[None]:
    """Turn disk errors into QembedError: what failed, what is kept, and how to continue."""
    try:
        yield
    except OSError as error:
        raise of_disk(error, job) from error


def of_disk(error: OSError, job: Job) -> QembedError:
    """The message for a disk error."""
    where = error.filename or job.partial
    said = os.strerror(error.errno) if error.errno else str(error)  # pyarrow puts words of its own around the system's
    if error.errno in NOT_ALLOWED:
        return BadInput(f"{where}: cannot be written ({said}); choose another --output")
    kept = f"; what is finished is kept in {job.partial}: " if job.partial.exists() else "; nothing was begun: "
    if error.errno in journal.FULL:
        room = "free some room, and the same command goes on"
        return QembedError(f"{where}: the disk is full ({said}){kept}{room}")
    return QembedError(f"{where}: cannot be read or written ({said}){kept}the same command goes on")


def _name(inputs: Inputs) -> str:
    return inputs.files[0].name if len(inputs.files) == 1 else f"{inputs.files[0].name} and {len(inputs.files) - 1} others"


def summary(job: Job, finished: Finished) -> dict[str, Any]:
    """What `--json` prints."""
    done = finished.done
    return {
        "output": str(job.output),
        "ids": None if finished.ids is None else str(finished.ids),
        "rejects": None if finished.rejects is None else str(finished.rejects),
        "vectors": done.vectors,
        "rejected": done.rejected,
        "rows": done.mark.rows,
        "resumed": finished.resumed,
        **{name: value for name, value in job.about.items() if name in ("model", "prompt", "instruction")},
        "dimensions": finished.dimensions,
        "dtype": job.dtype,
        "tokens": done.tokens if job.texts.tokenizer else None,
        "seconds": round(finished.seconds, 3),
    }
