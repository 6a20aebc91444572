"""The on-disk record of what a run has finished, so that the next run can resume.

The folder `.OUT.partial` beside OUT holds the journal, the growing output files, and the batches of the current window. Each
journal line records the length of every file after a complete window. Bytes beyond that length come from a killed run and are
cut off. So nothing is lost and nothing is written twice.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from qembed.embed.windows import Mark
from qembed.errors import BadInput, QembedError
from qembed.files import sync, write_atomically
from qembed.own_files import own_file, own_folder, start_anew
from qembed.targets import is_same_file

NAME = "journal.jsonl"
TARGETS = "targets.json"
LARGEST_TARGETS = 2**20
"""Bytes of TARGETS that are read."""
LONGEST_LINE = 2**24
"""Bytes of a line of the journal."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Done:
    """Finished work: complete windows, the input mark after them, bytes of each file, and total counts."""

    windows: int = 0
    mark: Mark = field(default_factory=Mark)
    sizes: Mapping[str, int] = field(default_factory=dict)
    vectors: int = 0
    rejected: int = 0
    tokens: int = 0
    ended: bool = False


class Journal:
    """The journal of a run, locked against other processes."""

    def __init__(self, folder: Path, file: IO[bytes], done: Done, notes: dict[str, Any]) -> None:
        self.folder, self.done, self.notes = folder, done, notes
        self._file = file

    def note(self, name: str, value: Any) -> None:
        """Record something known only once the run has begun."""
        self.notes[name] = value
        self._append({"note": name, "value": value})

    def finished(self, done: Done) -> None:
        """Record that everything up to `done` is on disk."""
        self._append({"done": asdict(done)})
        self.done = done

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        sync(self._file)


@contextmanager
def opened(folder: Path, settings: Mapping[str, Any], force: bool) -> Iterator[Journal]:
    """The journal in `folder`, new or of an interrupted run; `settings` are everything that the result depends on.

    With `force` an interrupted run with other settings is discarded.

    Raises:
        BadInput: the interrupted run had other settings, its journal is damaged, or the folder is not this user's.
        QembedError: another process has the journal open.
    """
    own_folder(folder)
    path = folder / NAME
    with own_file(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QembedError(f"{folder}: another qembed embed is writing there; wait for it, or end it") from error
        records, end = _records(file)
        wanted = json.loads(json.dumps(dict(settings)))
        if records and records[0] != {"settings": wanted}:
            if not force:
                raise BadInput(_differs(folder, records[0].get("settings"), wanted))
            records, end = [], 0
            _clear(folder)
        file.truncate(end)
        file.seek(0, os.SEEK_END)
        try:
            notes = {str(record["note"]): record["value"] for record in records if "note" in record}
            dones = [record["done"] for record in records if "done" in record]
            done = _done(dones[-1]) if dones else Done()
        except (TypeError, KeyError, ValueError) as error:
            raise BadInput(f"{path}: damaged; {start_anew(folder)}") from error
        journal = Journal(folder, file, done, notes)
        if not records:
            journal._append({"settings": wanted})
        yield journal


def check_sizes(folder: Path, done: Done, elsewhere: Mapping[str, Path]) -> None:
    """Check that no file of the run is shorter than the journal says.

    Of a run that has ended, files that become the output may be in place `elsewhere` already, and the others gone.

    Raises:
        BadInput: one is: it was changed, or the disk has lost what it had confirmed.
    """
    for name, size in done.sizes.items():
        path = folder / name
        if done.ended and not path.exists():
            if name not in elsewhere:
                continue
            path = elsewhere[name]
        length = path.stat().st_size if path.exists() else 0
        if length < size:
            raise BadInput(f"{path}: has {length:,} bytes, and the journal says {size:,}; {start_anew(folder)}")


def claim(folder: Path, targets: Sequence[Path]) -> None:
    """Record the files that the run in `folder` is going to write.

    Raises:
        BadInput: another run beside it, interrupted or still going on, is going to write one of them too, such as the ids of
            `v.npy` and `v.fvecs`.
    """
    write_atomically(folder / TARGETS, json.dumps([str(path.absolute()) for path in targets]))
    for other in sorted(folder.parent.glob(f".*.partial/{TARGETS}")):
        if other.parent.name == folder.name:
            continue
        try:
            with own_file(other, os.O_RDONLY) as file:
                theirs = [Path(path) for path in json.loads(file.read(LARGEST_TARGETS))]
        except (OSError, BadInput, ValueError, TypeError, RecursionError):  # of a run that has just ended, or none of ours
            continue
        for path in targets:
            if any(is_same_file(path, each) for each in theirs):
                raise BadInput(
                    f"{path}: the run in {other.parent} writes this file too; let it end, delete that folder if it was given "
                    "up, or choose another --output"
                )


def _done(record: Mapping[str, Any]) -> Done:
    """What a journal's line says.

    Raises:
        TypeError, KeyError, ValueError: no run writes such a line.
    """
    mark = Mark(**record["mark"])
    done = Done(**{**record, "mark": mark})
    counts = [done.windows, done.vectors, done.rejected, done.tokens, mark.rows, mark.chunks, *done.sizes.values()]
    if not all(type(count) is int and count >= 0 for count in counts) or type(done.ended) is not bool:
        raise ValueError("a count that is none")
    if not isinstance(mark.digest, str) or not all(Path(name).name == name for name in done.sizes):
        raise ValueError("a name that is none")
    return done


def remove(folder: Path) -> None:
    """Delete the folder: its content is in place or no longer needed."""
    shutil.rmtree(folder)


def _records(file: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The complete records and their end: the last line may be incomplete."""
    file.seek(0)
    records, end = [], 0
    while line := file.readline(LONGEST_LINE):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        records.append(record)
        end += len(line)
    return records, end


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != NAME:
            path.unlink()


def _differs(folder: Path, then: Any, now: dict[str, Any]) -> str:
    before = then if isinstance(then, dict) else {}
    names = [name for name in now if before.get(name) != now[name]]
    shown = ", ".join(f"{name} was {json.dumps(before.get(name))[:80]}, is {json.dumps(now[name])[:80]}" for name in names[:2])
    return (
        f"{folder}: the run that was broken off was another one ({shown}); give its options to go on with it, or --force to "
        "start anew"
    )
