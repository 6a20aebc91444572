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
from qembed.embed import formats, journal, spool, suspects
from qembed.embed.inputs import Inputs
from qembed.embed.job import Job, settings_of
from qembed.embed.journal import Journal, Totals
from qembed.embed.outputs import CHUNK_COLUMNS, IDS, REJECTS
from qembed.embed.readers import Reading
from qembed.embed.spool import Spool
from qembed.embed.suspects import Suspects
from qembed.embed.windows import Window, windows
from qembed.embed.writer import OnProgress, Writer, compute
from qembed.errors import BadInput, QembedError
from qembed.files import appearing, sync_folder, sync_path
from qembed.own_files import start_anew
from qembed.targets import already_exists, check_targets
from qembed.text.display import counted

OnNote = Callable[[str], None]
NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
REJECTED = 4
"""Exit code of a complete run with rejected rows."""


@dataclass(frozen=True)
class Outcome:
    """The outcome: total counts, and how many vectors an earlier run had already finished."""

    totals: Totals
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
    reserved = {"id", "vector", *(CHUNK_COLUMNS if job.texts.chunk_tokens else ())}
    for name in job.keep:
        if name in reserved:
            raise BadInput(f"--keep {name}: the output already has a column of that name")
    if not (job.partial / journal.NAME).exists():
        _check_targets(job)


def _check_targets(job: Job) -> None:
    """Check that no file that the job writes is one that it reads, or exists already (unless `force`)."""
    inputs = [*job.replaced, *job.others, *(file.path for file in job.inputs.files)]
    check_targets([job.target(name) for name in reversed(job.targets)], inputs, force=job.force)


def run(job: Job, on_progress: OnProgress = lambda _: None, on_note: OnNote = lambda _: None) -> Outcome:
    """Run the job, or resume an interrupted one. `on_note` is called with what the readers decided, such as a delimiter.

    Raises:
        BadInput: the input or the options cannot be used; with `strict`, a row cannot.
        QembedError: the engine failed, or the disk is full; finished work is kept.
    """
    check(job)
    start = time.monotonic()
    with reporting_disk_errors(job), journal.opened(job.partial, settings_of(job), job.force) as run_journal:
        resumed = run_journal.totals
        journal.check_sizes(job.partial, resumed, job.targets)
        if not isinstance(run_journal.notes.get("dimensions", None if resumed.windows else 1), int):
            raise BadInput(f"{job.partial / journal.NAME}: damaged; {start_anew(job.partial)}")
        if not resumed.ended:
            _check_targets(job)
            try:
                journal.claim(job.partial, list(job.targets.values()))
                _compute(job, run_journal, on_progress, on_note)
            except BaseException:
                spooled = any((job.partial / name).exists() for name in spool.FILES)
                if not run_journal.totals.windows and not spooled and not suspects.has_record(job.partial / suspects.FILE):
                    journal.remove(job.partial)
                raise
        dimensions = int(run_journal.notes["dimensions"])
        _put_in_place(job, run_journal)
        journal.remove(job.partial)
    targets = job.targets
    rejects = targets[REJECTS] if run_journal.totals.rejected else None
    return Outcome(run_journal.totals, dimensions, resumed.vectors, rejects, targets.get(IDS), time.monotonic() - start)


def _compute(job: Job, run_journal: Journal, on_progress: OnProgress, on_note: OnNote) -> None:
    """Embed window after window until the input ends."""
    reading = Reading(job.inputs, job.text_column, job.id_column, job.keep, job.rows, on_note)
    with _read_ahead(_windows(job, reading, run_journal.totals)) as upcoming:
        first = next(upcoming, None)
        if first is None and not run_journal.totals.windows:
            raise BadInput(f"{_names(job.inputs)}: holds no texts")
        if first is None:
            _note_repeated_ids(reading, on_note)
            # All windows are written; the run was killed before the journal said so.
            with Writer(job, run_journal, run_journal.notes["dimensions"], on_progress) as writer:
                writer.finish()
            return
        with job.engine() as engine:
            if run_journal.notes.get("dimensions") not in (None, engine.dimensions):
                raise BadInput(f"vectors have {engine.dimensions} numbers, and had {run_journal.notes['dimensions']} before")
            if "dimensions" not in run_journal.notes:
                run_journal.note("dimensions", engine.dimensions)
            with Writer(job, run_journal, engine.dimensions, on_progress) as writer:
                finished_batches = Spool(job.partial)
                suspect_batches = Suspects(job.partial / suspects.FILE, on_note)
                for window in itertools.chain([first], upcoming):
                    writer.begin(window)
                    writer.put(window, compute(window, engine, finished_batches, suspect_batches, writer.report))
                writer.finish()
    _note_repeated_ids(reading, on_note)


def _note_repeated_ids(reading: Reading, on_note: OnNote) -> None:
    """Say that ids are not unique: a database with one row per id would keep one of the vectors."""
    if count := reading.repeated_ids():
        verb = "names" if count == 1 else "name"
        on_note(f"{counted(count, 'id')} {verb} more than one row; a table with the id as its key would keep one of them")


def _windows(job: Job, reading: Reading, start: Totals) -> Iterator[Window]:
    for window in windows(reading.rows(), job.texts, start.mark, start.windows):
        window.share_read = min(1.0, reading.bytes_read / reading.total) if reading.total else 0.0
        if job.strict and window.rejects:
            first = window.rejects[0]
            raise BadInput(f"{first.place}: {first.reason} (--strict)")
        yield window


def _put_in_place(job: Job, run_journal: Journal) -> None:
    """Rename the files to their final names. Can be repeated after an interruption."""
    totals, targets = run_journal.totals, job.targets
    missing = [name for name in targets if (job.partial / name).exists() and not (name == REJECTS and not totals.rejected)]
    for name in missing:
        target = job.target(name)
        check_targets([target], [file.path for file in job.inputs.files], force=True)
        if not job.force and target.path.exists() and not filecmp.cmp(job.partial / name, target.path, shallow=False):
            raise BadInput(f"{already_exists(target.path, target.option)}; it appeared during the run")
    if not totals.rejected and job.force and targets[REJECTS].is_file():
        targets[REJECTS].unlink()
    for name in missing:
        _move(job.partial / name, targets[name])
    sync_folder(job.output.parent)


def _move(source: Path, target: Path) -> None:
    """Rename, or copy if the target is on another file system (only --rejects can be)."""
    try:
        source.replace(target)
    except OSError:
        if source.stat().st_dev == target.parent.stat().st_dev:
            raise
        with appearing(target) as temporary:
            shutil.copyfile(source, temporary)
            sync_path(temporary)


@contextlib.contextmanager
def _read_ahead(source: Iterator[Window]) -> Iterator[Iterator[Window]]:
    """The windows, each read while the previous one is computed. A read error is raised after the windows before it."""
    waiting: queue.Queue[Window | BaseException | None] = queue.Queue(1)
    stop = threading.Event()

    def read() -> None:
        end: BaseException | None = None
        try:
            for window in source:
                if not _put(waiting, window, stop):
                    return
        except BaseException as error:  # noqa: BLE001 - re-raised by `received`
            end = BadInput(failed(error, "--model")) if is_panic(error) else error
        _put(waiting, end, stop)

    def received() -> Iterator[Window]:
        while (window := waiting.get()) is not None:
            if isinstance(window, BaseException):
                raise window
            yield window

    threading.Thread(target=read, name="reader", daemon=True).start()
    try:
        yield received()
    finally:
        stop.set()


def _put(waiting: queue.Queue[Any], value: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            waiting.put(value, timeout=0.2)
            return True
    return False


@contextlib.contextmanager
def reporting_disk_errors(job: Job) -> Iterator[None]:
    """Turn disk errors into QembedError: what failed, what is kept, and how to continue."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, job) from error


def disk_error(error: OSError, job: Job) -> QembedError:
    """The message for a disk error."""
    where = error.filename or job.partial
    reason = os.strerror(error.errno) if error.errno else str(error)  # pyarrow wraps the system's message
    if error.errno in NOT_ALLOWED:
        return BadInput(f"{where}: cannot be written ({reason}); choose another --output")
    state = f"; finished work is kept in {job.partial}: " if job.partial.exists() else "; nothing was written: "
    if error.errno in journal.FULL:
        room = "free some space, then the same command resumes"
        return QembedError(f"{where}: the disk is full ({reason}){state}{room}")
    return QembedError(f"{where}: cannot be read or written ({reason}){state}the same command resumes")


def _names(inputs: Inputs) -> str:
    return inputs.files[0].name if len(inputs.files) == 1 else f"{inputs.files[0].name} and {len(inputs.files) - 1} others"


def summary(job: Job, outcome: Outcome) -> dict[str, Any]:
    """What `--json` prints."""
    totals = outcome.totals
    return {
        "output": str(job.output),
        "ids": None if outcome.ids is None else str(outcome.ids),
        "rejects": None if outcome.rejects is None else str(outcome.rejects),
        "vectors": totals.vectors,
        "rejected": totals.rejected,
        "rows": totals.mark.rows,
        "resumed": outcome.resumed,
        **{name: value for name, value in job.about.items() if name in ("model", "prompt", "instruction")},
        "dimensions": outcome.dimensions,
        "dtype": job.dtype,
        "tokens": totals.tokens if job.texts.tokenizer else None,
        "seconds": round(outcome.seconds, 3),
    }
