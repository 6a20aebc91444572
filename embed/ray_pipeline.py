"""The job on a Ray cluster, as a Ray Data pipeline: files → windows → actors with an engine each → parts.

A window is a block of the pipeline and becomes a part of the output. Reading streams: only as many windows are held as the
actors can work on. An actor writes its part under a temporary name, renames it, and then writes a record. If an actor or node
is killed, only its current windows are lost; Ray gives them to another actor, and nothing is written twice. A restarted job
skips windows with a record. At the end there must be a record for each window that was read.

Ray repeats a task whose results are lost, and assumes that it yields the same results in the same order. So the windows to
skip are fixed before reading starts.

Input, model and output must have the same paths on all nodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qembed.embed import journal, outputs, parquet, ray_cluster
from qembed.embed.engine import Engine, redirect_output
from qembed.embed.inputs import Inputs
from qembed.embed.job import Job, settings_of
from qembed.embed.journal import Totals
from qembed.embed.outputs import VectorBlock, VectorLayout
from qembed.embed.ray_cluster import Share
from qembed.embed.readers import Reading
from qembed.embed.run import disk_error, reporting_disk_errors
from qembed.embed.suspects import Suspects
from qembed.embed.windows import Position, Window, windows
from qembed.embed.writer import embed_window
from qembed.errors import BadInput, QembedError
from qembed.files import sync, sync_folder
from qembed.targets import already_exists, check_folder
from qembed.vectors import dtypes

MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
ATTEMPTS = 3
GIVE_SAME = "give the same input, or --force to start over"


@dataclass(frozen=True)
class Work:
    """What an actor needs: the job, the layout of the parts, and the types of their columns."""

    job: Job
    shape: VectorLayout
    types: Mapping[str, str]

    @property
    def parts(self) -> Path:
        """The folder that becomes the output."""
        return self.job.partial / "parts"

    @property
    def records(self) -> Path:
        """The folder with a record per finished window."""
        return self.job.partial / "records"

    def name(self, file: int, number: int) -> str:
        """The name of a window's part; sorting by name gives the input order."""
        return f"part-{file:05d}-{number:07d}.parquet"


def run(
    job: Job,
    share: Share,
    dimensions: int,
    on_progress: Callable[[Totals], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the job, or resume an interrupted one; returns the manifest.

    `job.output` becomes a folder with the parts, the manifest, and the rejects if there are any. `on_note` is called with what
    was decided about the first file, such as its delimiter; the others are read on the nodes.

    Raises:
        BadInput: the input or the options cannot be used, or the output exists.
        QembedError: no cluster, or the job failed; finished parts are kept.
    """
    files = [replace(file, path=file.path.resolve()) for file in job.inputs.files]
    job = replace(job, output=job.output.resolve(), inputs=replace(job.inputs, files=files))
    if not job.partial.exists():
        _check_free(job)
    first = next(windows(replace(_reading(job, files[0]), on_note=on_note).rows(), job.texts, Position(), 0), None)
    if first is None and len(files) == 1:
        raise BadInput(f"{files[0].name}: holds no texts")
    about = {**job.about, "dimensions": dimensions, "dtype": job.dtype}
    shape = VectorLayout(job.dtype, dtypes.element(job.dtype), dtypes.width(dimensions, job.dtype), job.columns, about)
    items = [] if first is None else first.items
    work = Work(job, shape, {name: parquet.type_of([item.columns.get(name) for item in items]) for name in job.columns})
    with reporting_disk_errors(job), journal.opened(job.partial, settings_of(job), job.force) as run_journal:
        if not run_journal.totals.ended:
            _check_free(job)
            for folder in (work.parts, work.records):
                folder.mkdir(exist_ok=True)
            try:
                with (
                    redirect_output(verbose=False),
                    ray_cluster.connected(share),
                ):  # Ray prints on standard output, even at shutdown
                    _pipeline(work, share, on_progress)
            finally:
                if not _finished_windows(work):
                    journal.remove(job.partial)
            _finish(work)
            run_journal.record(replace(run_journal.totals, ended=True))
        if work.parts.exists():
            if job.output.is_dir():
                shutil.rmtree(job.output)
            work.parts.replace(job.output)
            sync_folder(job.output.parent)
        journal.remove(job.partial)
    manifest: dict[str, Any] = json.loads((job.output / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _check_free(job: Job) -> None:
    check_folder(job.output, [*job.replaced, *job.others, *(file.path for file in job.inputs.files)])
    if job.output.exists() and not job.force:
        raise BadInput(already_exists(job.output))
    if job.output.exists() and not (job.output / MANIFEST).exists():
        raise BadInput(
            f"{job.output}: not written by qembed embed --ray, so --force does not replace it; choose another --output"
        )


def _pipeline(work: Work, share: Share, on_progress: Callable[[Totals], None]) -> None:
    """Embed all windows without a record. Failures that Ray cannot repair restart the pipeline, as long as parts get finished.

    Raises:
        QembedError: a part failed for a reason of its own, or Ray failed ATTEMPTS times without a finished part in between.
    """
    totals, fruitless = Totals(), 0
    while True:
        before = _finished_windows(work)
        try:
            for part in _parts(work, share, before):
                if part["failed"]:
                    raise _final_error(work, pickle.loads(part["failed"]))  # pickled by `Embedder`
                vectors, rejected = totals.vectors + part["vectors"], totals.rejected + part["rejected"]
                totals = replace(totals, windows=totals.windows + 1, vectors=vectors, rejected=rejected)
                on_progress(totals)
            if not (missing := _missing(work)):
                return
            raise RuntimeError(f"Ray lost {missing}")
        except QembedError:
            raise
        except Exception as error:  # a lost node shows as a RayError, or as an assertion somewhere in Ray Data
            fruitless = fruitless + 1 if _finished_windows(work) == before else 1
            if fruitless == ATTEMPTS:
                message = " ".join(str(error).split())[-300:] or type(error).__name__
                raise QembedError(f"the job failed: {message}; finished parts are kept in {work.job.partial}") from error


def _final_error(work: Work, failure: QembedError | OSError) -> QembedError:
    """The error that ends the job after a part failed."""
    if isinstance(failure, OSError):
        return disk_error(failure, work.job)
    kind = BadInput if isinstance(failure, BadInput) else QembedError
    return kind(f"{failure}; finished parts are kept in {work.job.partial}")


def _finished_windows(work: Work) -> frozenset[str]:
    """The names of finished windows."""
    return frozenset(path.stem for path in work.records.glob("part-*.json"))


def _missing(work: Work) -> str:
    """A file that was not read completely, or a window that was read but not embedded; empty if nothing is missing.

    Raises:
        BadInput: there are more records than windows.
    """
    read = set()
    for number, file in enumerate(work.job.inputs.files):
        if not _end(work, number).exists():
            return f"the end of {file.name}"
        count = json.loads(_end(work, number).read_text(encoding="utf-8"))["windows"]
        read |= {work.name(number, window) for window in range(count)}
    finished = _finished_windows(work)
    if finished - read:
        raise BadInput(f"the input has fewer rows than before; {GIVE_SAME}")
    return f"{len(read - finished)} windows" if read - finished else ""


def _parts(work: Work, share: Share, finished: frozenset[str]) -> Iterator[Mapping[str, Any]]:
    """The record of each new part; windows in `finished` are skipped."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = (
        1  # one window per block, so that a lost actor costs its windows only, and actors share the work evenly
    )
    context.enable_progress_bars = False
    workers, resources = ray_cluster.resources(share, ray.cluster_resources())
    count = len(work.job.inputs.files)
    files = ray.data.from_items([{"file": number} for number in range(count)], override_num_blocks=count)
    parts = (
        # Reading takes no share of the cluster: the engines may have all of it.
        files.map_batches(_read, batch_size=1, num_cpus=0, fn_kwargs={"work": work, "finished": finished}).map_batches(
            Embedder, batch_size=1, concurrency=workers, fn_constructor_kwargs={"work": work}, **resources
        )
    )
    yield from parts.iter_rows()


def _reading(job: Job, file: Any) -> Reading:
    return Reading(Inputs([file], job.inputs.folder), job.text_column, job.id_column, job.keep, job.rows)


def _read(batch: Mapping[str, Any], work: Work, finished: frozenset[str]) -> Iterator[dict[str, list[Any]]]:
    """The windows of a file, except finished ones. A reading error takes the place of the remaining windows."""
    for file in map(int, batch["file"]):
        count = 0
        try:
            for window in windows(_reading(work.job, work.job.inputs.files[file]).rows(), work.job.texts, Position(), 0):
                if work.job.strict and window.rejects:
                    raise BadInput(f"{window.rejects[0].place}: {window.rejects[0].reason} (--strict)")
                name, count = work.name(file, window.number), window.number + 1
                if name in finished:
                    _check_same(work, file, name, window)
                else:
                    yield {"file": [file], "window": [pickle.dumps(window)]}
            _write_renamed(json.dumps({"windows": count}).encode(), _end(work, file))
        except (QembedError, OSError) as error:
            yield {"file": [file], "window": [pickle.dumps(error)]}


def _check_same(work: Work, file: int, name: str, window: Window) -> None:
    if json.loads(_record(work, name).read_text(encoding="utf-8"))["digest"] != window.end.digest:
        raise BadInput(f"{work.job.inputs.files[file].name}: the input has changed; {GIVE_SAME}")


class Embedder:
    """A Ray actor that holds an engine and embeds windows."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._stack = ExitStack()
        self._failure: QembedError | None = None
        try:
            self._engine: Engine = self._stack.enter_context(work.job.engine())
        except QembedError as error:
            self._failure = error

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Embed a window, write its part and its record. Errors are returned, and end the job."""
        (file,), (pickled,) = batch["file"], batch["window"]
        window = pickle.loads(pickled)  # pickled by `_read`
        try:
            if self._failure is not None:
                raise self._failure
            if isinstance(window, Exception):
                raise window
            record = self._part(int(file), window)
            return {"vectors": [record["vectors"]], "rejected": [record["rejected"]], "failed": [b""]}
        except (QembedError, OSError) as error:
            return {"vectors": [0], "rejected": [0], "failed": [pickle.dumps(error)]}

    def _part(self, file: int, window: Window) -> dict[str, Any]:
        work, name = self.work, self.work.name(file, window.number)
        in_engine = work.records / f"in-engine-{name}.json"  # Ray gives the window to another actor if this one crashes
        block, rejects = embed_window(
            window, self._engine, Suspects(in_engine), work.job, lambda block: _unfit(block, work.types)
        )
        if work.job.strict and rejects:
            raise BadInput(f"{rejects[0].place}: {rejects[0].reason} (--strict)")
        sizes: dict[str, Any] = {}
        if block.ids:
            sizes = _write(parquet.table(block, parquet.schema(work.shape, work.types), work.shape), work.parts / name)
        record = {
            "file": name if block.ids else None,
            "vectors": len(block.ids),
            "rejected": len(rejects),
            **sizes,
            "digest": window.end.digest,
            "rejects": [reject.record for reject in rejects],
        }
        _write_renamed(json.dumps(record).encode(), _record(work, name))
        in_engine.unlink(missing_ok=True)
        return record


def _unfit(block: VectorBlock, types: Mapping[str, str]) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for name, column_type in types.items():
        if name not in outputs.CHUNK_COLUMNS:
            reasons |= {
                index: f"{name} is {reason}" for index, reason in parquet.unfit(block.columns[name], column_type).items()
            }
    return reasons


def _write(table: Any, path: Path) -> dict[str, Any]:
    content = parquet.whole_file(table)
    _write_renamed(content, path)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_renamed(content: bytes, path: Path) -> None:
    """Write a file under a name unique to this process, then rename it: several nodes may write the same part."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        sync(file)
    temporary.replace(path)


def _record(work: Work, name: str) -> Path:
    return work.records / f"{name}.json"


def _end(work: Work, file: int) -> Path:
    """The file that records how many windows a file has."""
    return work.records / f"end-{file:05d}.json"


def _finish(work: Work) -> None:
    """Complete the folder: rejects and manifest, in input order."""
    for path in work.parts.glob(".*"):
        path.unlink()  # left by killed actors
    paths = sorted(work.records.glob("part-*.json"))
    vectors = rejected = 0
    parts = []
    with (work.parts / REJECTS).open("wb") as file:
        for path in paths:
            record = json.loads(path.read_text(encoding="utf-8"))
            vectors, rejected = vectors + record["vectors"], rejected + record["rejected"]
            file.write(outputs.lines(record["rejects"]))
            if record["file"]:
                parts.append({name: record[name] for name in ("file", "vectors", "bytes", "sha256")})
        sync(file)
    if not rejected:
        (work.parts / REJECTS).unlink()
    if not parts:
        types = dict.fromkeys(work.shape.columns, "string")
        empty = VectorBlock(
            dtypes.encode(_no_vectors(work.shape), work.job.dtype), [], {name: [] for name in work.shape.columns}
        )
        name = work.name(0, 0)
        sizes = _write(parquet.table(empty, parquet.schema(work.shape, types), work.shape), work.parts / name)
        parts = [{"file": name, "vectors": 0, **sizes}]
    manifest = {
        **work.shape.about,
        "columns": ["id", "vector", *work.shape.columns],
        "vectors": vectors,
        "rejected": rejected,
        "rejects": REJECTS if rejected else None,
        "parts": parts,
    }
    _write_renamed(json.dumps(manifest, indent=1).encode(), work.parts / MANIFEST)


def _no_vectors(shape: VectorLayout) -> Any:
    import numpy as np

    return np.zeros((0, shape.width * (8 if shape.dtype == "binary" else 1)), np.float32)
