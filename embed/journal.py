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

from qembed.embed.windows import Position
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
class Totals:
    """Finished work: complete windows, the input position after them, bytes of each file, and total counts."""

    windows: int = 0
    mark: Position = field(default_factory=Position)
    sizes: Mapping[str, int] = field(default_factory=dict)
    vectors: int = 0
    rejected: int = 0
    tokens: int = 0
    ended: bool = False


class Journal:
    """The journal of a run, locked against other processes."""

    def __init__(self, folder: Path, file: IO[bytes], totals: Totals, notes: dict[str, Any]) -> None:
        self.folder, self.totals, self.notes = folder, totals, notes
        self._file = file

    def note(self, name: str, value: Any) -> None:
        """Record a value that is known only after the run has started."""
        self.notes[name] = value
        self._append({"note": name, "value": value})

    def record(self, totals: Totals) -> None:
        """Record that everything up to `totals` is on disk."""
        self._append({"done": asdict(totals)})
        self.totals = totals

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
            raise QembedError(f"{folder}: another qembed embed is writing there; wait until it ends, or stop it") from error
        records, end = _records(file)
        current = json.loads(json.dumps(dict(settings)))
        if records and records[0] != {"settings": current}:
            if not force:
                raise BadInput(_differs(folder, records[0].get("settings"), current))
            records, end = [], 0
            _clear(folder)
        file.truncate(end)
        file.seek(0, os.SEEK_END)
        try:
            notes = {str(record["note"]): record["value"] for record in records if "note" in record}
            progress = [record["done"] for record in records if "done" in record]
            totals = _totals(progress[-1]) if progress else Totals()
        except (TypeError, KeyError, ValueError) as error:
            raise BadInput(f"{path}: damaged; {start_anew(folder)}") from error
        journal = Journal(folder, file, totals, notes)
        if not records:
            journal._append({"settings": current})
        yield journal


def check_sizes(folder: Path, totals: Totals, elsewhere: Mapping[str, Path]) -> None:
    """Check that no file of the run is shorter than the journal says.

    Of a run that has ended, files that become the output may be in place `elsewhere` already, and the others gone.

    Raises:
        BadInput: one is: it was changed, or the disk has lost what it had confirmed.
    """
    for name, size in totals.sizes.items():
        path = folder / name
        if totals.ended and not path.exists():
            if name not in elsewhere:
                continue
            path = elsewhere[name]
        length = path.stat().st_size if path.exists() else 0
        if length < size:
            raise BadInput(f"{path}: has {length:,} bytes, and the journal says {size:,}; {start_anew(folder)}")


def claim(folder: Path, targets: Sequence[Path]) -> None:
    """Record the files that the run in `folder` is going to write.

    Raises:
        BadInput: another run in the same folder, interrupted or running, writes one of them too, such as the ids of
            `v.npy` and `v.fvecs`.
    """
    write_atomically(folder / TARGETS, json.dumps([str(path.absolute()) for path in targets]))
    for other in sorted(folder.parent.glob(f".*.partial/{TARGETS}")):
        if other.parent.name == folder.name:
            continue
        try:
            with own_file(other, os.O_RDONLY) as file:
                claimed = [Path(path) for path in json.loads(file.read(LARGEST_TARGETS))]
        except (OSError, BadInput, ValueError, TypeError, RecursionError):  # of a run that has just ended, or none of ours
            continue
        for path in targets:
            if any(is_same_file(path, claimed_path) for claimed_path in claimed):
                raise BadInput(
                    f"{path}: the run in {other.parent} writes this file too; let it finish, delete that folder if it was "
                    "abandoned, or choose another --output"
                )


def _totals(record: Mapping[str, Any]) -> Totals:
    """The totals in a line of the journal.

    Raises:
        TypeError, KeyError, ValueError: no run writes such a line.
    """
    mark = Position(**record["mark"])
    totals = Totals(**{**record, "mark": mark})
    counts = [totals.windows, totals.vectors, totals.rejected, totals.tokens, mark.rows, mark.chunks, *totals.sizes.values()]
    if not all(type(count) is int and count >= 0 for count in counts) or type(totals.ended) is not bool:
        raise ValueError("a count that is none")
    if not isinstance(mark.digest, str) or not all(Path(name).name == name for name in totals.sizes):
        raise ValueError("a name that is none")
    return totals


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


def _differs(folder: Path, previous: Any, current: dict[str, Any]) -> str:
    before = previous if isinstance(previous, dict) else {}
    names = [name for name in current if before.get(name) != current[name]]
    differences = ", ".join(
        f"{name} was {json.dumps(before.get(name))[:80]}, is {json.dumps(current[name])[:80]}" for name in names[:2]
    )
    return f"{folder}: the interrupted run differs ({differences}); give its options to resume it, or --force to start over"
