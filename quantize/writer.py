"""Writes the output folder atomically: parts first, config.json last, then one rename.

All files are written in a hidden folder next to the target, which is renamed to the target once it is complete. A run that
ends early leaves an existing target unchanged, and keeps its finished layers for `--resume`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.files import COPIED, check_file, matching, read_json
from qembed.checkpoint.int8_table import INT8, QUANT_METHOD
from qembed.errors import BadInput, Interrupted, QembedError, unwritable
from qembed.files import sync_path, write_atomically
from qembed.own_files import own_file, own_folder
from qembed.quantize.parts import REPORT, Parts
from qembed.quantize.settings import ROUNDING_ALIASES

FINGERPRINT = "run.json"
REDUNDANT = ("vocab.json", "merges.txt")
"""Files whose contents tokenizer.json includes; 4.4 MB in Qwen3-Embedding."""


@dataclass(frozen=True)
class Work:
    """The working folders of a run.

    Attributes:
        checkpoint: the folder that becomes the target.
        parts: finished parts and the run's report; never part of the target.
    """

    checkpoint: Path
    parts: Path


@contextmanager
def claim(target: Path, *, force: bool) -> Iterator[Path]:
    """Create and lock the hidden working folder next to `target`; remove it at the end if it is empty.

    If a killed run had moved an old target aside without replacing it, moves it back first.

    Raises:
        BadInput: the target exists (with `force`: and qembed did not write it), it cannot be written, or another run is
            writing it.
        QembedError: the disk is full.
    """
    partial, replaced = target.with_name(f".{target.name}.partial"), _replaced(target)
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent}: no such folder; create it first, or choose another --output")
    if not replaced.exists():
        _check_target(target, force=force)
    try:
        own_folder(partial)
        lock = own_file(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise unwritable(f"{partial}: cannot be written", error) from error
    with lock:
        _lock(lock, partial / "lock", target)
        try:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            _check_target(target, force=force)
            yield partial
        finally:
            if partial.is_dir() and {path.name for path in partial.iterdir()} == {"lock"}:
                _remove(partial)


@contextmanager
def new_folder(target: Path, partial: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> Iterator[Work]:
    """Create the working folders in `partial` (from `claim`); without an error, `checkpoint` replaces `target` at the end.

    After an error, finished layers stay for the next run, unless the error is BadInput. The next run deletes them, or with
    `resume` reuses them; for that its `fingerprint` (JSON types), which covers everything that determines the bytes of the
    result, must equal the interrupted run's.

    Raises:
        BadInput: the interrupted run has another fingerprint.
        Interrupted: a KeyboardInterrupt arrived; the message says what is kept and how to continue.
        QembedError: writing failed, as on a full disk.
    """
    work = Work(partial / "checkpoint", partial / "parts")
    fingerprint_path = partial / FINGERPRINT
    if resume and fingerprint_path.exists() and work.checkpoint.is_dir():
        _require_same(read_json(fingerprint_path), fingerprint)
        for path in partial.rglob("*.tmp"):
            path.unlink()
    else:
        _empty(partial)
    try:
        for folder in (work.checkpoint, work.parts):
            folder.mkdir(exist_ok=True)
        write_atomically(fingerprint_path, json.dumps(fingerprint))
        yield work
        for path in [*work.checkpoint.rglob("*"), work.checkpoint]:
            sync_path(path)
        _replace(work.checkpoint, target)
    except BadInput:
        _remove(partial)
        raise
    except BaseException as error:
        progress = _resumable_progress(work.parts)
        if not progress:
            _remove(partial)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"{target}: interrupted{progress or '; nothing was kept'}") from error
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise QembedError(f"{target}: could not be written: {reason}{progress or '; nothing was kept'}") from error
        raise
    _remove(partial)
    shutil.rmtree(_replaced(target), ignore_errors=True)


def companions(source: Checkpoint) -> list[Path]:
    """The files besides the weights that belong to a checkpoint: tokenizer, pooling, prompts, licence.

    Raises:
        BadInput: a file cannot be read, is too large, or is a link to a file of somebody else's, which would be published.
    """
    paths = matching(source.folder, COPIED)
    for path in paths:
        check_file(path, source.folder)
        try:
            path.open("rb").close()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    return paths


def copy_companions(source: Checkpoint, folder: Path, *, without: Collection[str] = ()) -> None:
    """Copy tokenizer, pooling, prompts and licence unchanged into `folder`, except the file names in `without`."""
    for path in companions(source):
        if path.name not in without:
            destination = folder / path.relative_to(source.folder)
            destination.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, destination)


def int4_config(
    config: Mapping[str, Any], group_size: int, token_table: str = "float16", floats: Sequence[str] = ()
) -> dict[str, Any]:
    """The source's `config` with AWQ's `quantization_config`, and float16 as the dtype of all other tensors.

    An INT8 `token_table` changes the name of the quantization method, so that software that cannot read the table refuses the
    checkpoint. `rope_theta` is written twice: transformers 4 reads it from the top level, transformers 5 from
    `rope_parameters`. `floats` are names of linear layers outside the blocks, which are not quantized.
    """
    int4 = dict(config)
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    int4.update(dict.fromkeys(dtype_keys, "float16"))
    parameters = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", parameters.get("rope_theta"))
    if theta is not None:
        int4["rope_theta"] = theta
        int4["rope_parameters"] = {
            "rope_type": "default",
            **(config.get("rope_scaling") or {}),
            **parameters,
            "rope_theta": theta,
        }
    int4["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": list(floats) or None,
    }
    if token_table == INT8:
        int4["quantization_config"].update(quant_method=QUANT_METHOD, token_table=INT8)
    return int4


def as_json(value: object) -> str:
    """`value` as indented JSON, with a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _replaced(target: Path) -> Path:
    """Where the old target is moved while the new one takes its place."""
    return target.with_name(f".{target.name}.replaced")


def _check_target(target: Path, *, force: bool) -> None:
    """Raise BadInput if `target` exists, unless qembed wrote it and `force` allows to replace it."""
    if target.exists() or target.is_symlink():
        if not force:
            raise BadInput(f"{target} exists already; choose another --output, or --force to replace it")
        if not (target / MANIFEST).exists():
            raise BadInput(f"{target}: not written by qembed quantize, so --force does not replace it; choose another --output")


def _replace(checkpoint: Path, target: Path) -> None:
    """Rename `checkpoint` to `target`. Moves an old target aside first, and back if the rename fails."""
    replaced = _replaced(target)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        checkpoint.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync_path(target.parent)


def _resumable_progress(parts: Path) -> str:
    """What an interrupted run keeps, as the end of an error message; empty if no layer is finished."""
    if (parts / REPORT).exists():
        layers = "all layers are"
    elif count := Parts(parts).layers:
        layers = f"{count} finished {'layer is' if count == 1 else 'layers are'}"
    else:
        return ""
    return f"; {layers} kept: run the same command with --resume to continue, or without it to start over"


def _require_same(previous: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise BadInput, naming every difference, unless both fingerprints are equal.

    `previous` may contain a former name of the rounding method.
    """
    previous = {name: ROUNDING_ALIASES.get(value, value) if name == "rounding" else value for name, value in previous.items()}
    differences = []
    for key in sorted(previous.keys() | current.keys()):
        before, now = previous.get(key), current.get(key)
        if before != now:
            hashed = any(isinstance(value, str) and len(value) == 64 for value in (before, now))
            differences.append(f"{key} has changed" if hashed else f"{key} was {before}, is {now}")
    if differences:
        reason = "; ".join(differences)
        raise BadInput(f"--resume: the interrupted run differs from this one: {reason}; start over without --resume")


def _lock(lock: IO[bytes], path: Path, target: Path) -> None:
    """Take the file lock `lock`, an open file of the name `path`.

    Comparing inodes detects a run that held the lock and deleted its file after this process had opened it.

    Raises:
        BadInput: another run holds the lock, or has deleted it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = path.stat().st_ino == os.fstat(lock.fileno()).st_ino
    except OSError as error:
        raise BadInput(f"{target}: another qembed quantize is writing it") from error
    if not current:
        raise BadInput(f"{target}: another qembed quantize is writing it")


def _empty(partial: Path) -> None:
    """Delete everything in `partial` but the lock."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _remove(partial: Path) -> None:
    """Delete `partial`, the lock last, so that no other run starts in it meanwhile."""
    with suppress(OSError):
        _empty(partial)
        (partial / "lock").unlink()
        partial.rmdir()
