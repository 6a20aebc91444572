"""The folder that `quantize` writes: parts as they are made, config.json last, one rename at the end.

Everything goes into a hidden folder beside the target. The target appears by a rename when it is whole; a run that ends early
leaves the target as it was, and its finished layers for `--resume`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.files import read_json
from qembed.checkpoint.int8_table import INT8, QUANT_METHOD
from qembed.errors import BadInput, Interrupted, QembedError
from qembed.files import sync_path, write_atomically
from qembed.quantize.parts import DONE, Parts

FINGERPRINT = "run.json"
COPIED = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "modules.json",
    "[0-9]_*/config.json",
    "LICENSE*",
    "NOTICE",
)
REPEATED = ("vocab.json", "merges.txt")
"""Files that say again what tokenizer.json says: 4.4 MB of Qwen3-Embedding's."""


@dataclass(frozen=True)
class Work:
    """Where a run puts what it makes.

    Attributes:
        checkpoint: the folder that becomes the target.
        parts: finished parts, and what the run knows of itself; never part of the target.
    """

    checkpoint: Path
    parts: Path


@contextmanager
def claim(target: Path, *, force: bool) -> Iterator[Path]:
    """The hidden folder beside `target` to work in, held against other runs; cleared away if it stays empty.

    A target that a killed run had put aside is put back first.

    Raises:
        BadInput: the target exists (with `force`: and is not ours), cannot be written, or another run is writing it.
        QembedError: the disk is full.
    """
    partial, replaced = target.with_name(f".{target.name}.partial"), _replaced(target)
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent}: no such folder; make it first, or choose another --output")
    if not replaced.exists():
        _check_target(target, force=force)
    try:
        partial.mkdir(exist_ok=True)
        lock = (partial / "lock").open("a")
    except OSError as error:
        kind = QembedError if error.errno in (errno.ENOSPC, errno.EDQUOT) else BadInput
        raise kind(f"{partial}: cannot be written: {error.strerror}") from error
    with lock:
        _lock(lock, target)
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
    """Places to work in within `partial` (from `claim`), of which one becomes `target` when the context ends without an error.

    An old target is replaced at that moment and not earlier. A run that does not come to its end leaves its finished layers,
    unless it was bad input that ended it. The next run clears them away or, with `resume`, finds them there; `fingerprint`
    (JSON types) is what must be the same for that: everything that decides the bytes of the result.

    Raises:
        BadInput: the run to be resumed was another one.
        Interrupted: KeyboardInterrupt, with what is left and how to go on.
        QembedError: the disk is full, or the like.
    """
    work = Work(partial / "checkpoint", partial / "parts")
    noted = partial / FINGERPRINT
    if resume and noted.exists() and work.checkpoint.is_dir():
        _compare(read_json(noted), fingerprint)
        for path in partial.rglob("*.tmp"):
            path.unlink()
    else:
        _empty(partial)
    try:
        for folder in (work.checkpoint, work.parts):
            folder.mkdir(exist_ok=True)
        write_atomically(noted, json.dumps(fingerprint))
        yield work
        for path in [*work.checkpoint.rglob("*"), work.checkpoint]:
            sync_path(path)
        _put(work.checkpoint, target)
    except BadInput:
        _remove(partial)
        raise
    except BaseException as error:
        kept = _kept(work.parts)
        if not kept:
            _remove(partial)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"{target}: interrupted{kept or '; nothing was left there'}") from error
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise QembedError(f"{target}: could not be written: {reason}{kept or '; nothing was left there'}") from error
        raise
    _remove(partial)
    shutil.rmtree(_replaced(target), ignore_errors=True)


def companions(source: Checkpoint) -> list[Path]:
    """The files beside the weights that a checkpoint needs: tokenizer, pooling, prompts, licence.

    Raises:
        BadInput: one cannot be read.
    """
    found = [path for pattern in COPIED for path in sorted(source.folder.glob(pattern))]
    for path in found:
        try:
            path.open("rb").close()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    return found


def copy_companions(source: Checkpoint, folder: Path, *, without: Collection[str] = ()) -> None:
    """Copy the tokenizer, pooling and prompts beside the weights, as they are, except for the files named in `without`."""
    for path in companions(source):
        if path.name not in without:
            place = folder / path.relative_to(source.folder)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def int4_config(config: Mapping[str, Any], group_size: int, token_table: str = "float16") -> dict[str, Any]:
    """`config` of the source, with the quantization that vLLM, SGLang and transformers read, and float16 for the rest.

    With an INT8 `token_table` the method has a name of its own, so that what cannot read the table refuses the checkpoint.
    transformers 4 reads `rope_theta` from the top level, transformers 5 from `rope_parameters`: both get it.
    """
    made = dict(config)
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    made.update(dict.fromkeys(dtype_keys, "float16"))
    parameters = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", parameters.get("rope_theta"))
    if theta is not None:
        made["rope_theta"] = theta
        made["rope_parameters"] = {
            "rope_type": "default",
            **(config.get("rope_scaling") or {}),
            **parameters,
            "rope_theta": theta,
        }
    made["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    if token_table == INT8:
        made["quantization_config"].update(quant_method=QUANT_METHOD, token_table=INT8)
    return made


def as_json(value: object) -> str:
    """`value` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _replaced(target: Path) -> Path:
    """Where the old target stands while the new one is put in its place."""
    return target.with_name(f".{target.name}.replaced")


def _check_target(target: Path, *, force: bool) -> None:
    if target.exists() or target.is_symlink():
        if not force:
            raise BadInput(f"{target}: exists already; choose another --output, or replace it with --force")
        if not (target / MANIFEST).exists():
            raise BadInput(f"{target}: not made by qembed quantize, so --force does not replace it; choose another --output")


def _put(checkpoint: Path, target: Path) -> None:
    """Rename `checkpoint` to `target`; an old target is put aside, and back if that fails."""
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


def _kept(parts: Path) -> str:
    """What a run that was broken off leaves, as the end of its message; nothing if no layer is finished."""
    if (parts / DONE).exists():
        kept = "all layers are"
    elif count := Parts(parts).layers:
        kept = f"{count} finished {'layer is' if count == 1 else 'layers are'}"
    else:
        return ""
    return f"; {kept} kept: the same command with --resume goes on from there, without it the next run starts anew"


def _compare(noted: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raise BadInput, naming what differs, unless both are the same."""
    differs = []
    for key in sorted(noted.keys() | fingerprint.keys()):
        before, now = noted.get(key), fingerprint.get(key)
        if before != now:
            hashed = any(isinstance(value, str) and len(value) == 64 for value in (before, now))
            differs.append(f"{key} has changed" if hashed else f"{key} was {before}, is {now}")
    if differs:
        reason = "; ".join(differs)
        raise BadInput(f"--resume: the run that was broken off was another one: {reason}; start anew without --resume")


def _lock(lock: IO[str], target: Path) -> None:
    """Hold `lock` unless another run holds it, or held it and cleared it away between our opening and our asking."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = Path(lock.name).stat().st_ino == os.fstat(lock.fileno()).st_ino
    except OSError as error:
        raise BadInput(f"{target}: another qembed quantize is writing it") from error
    if not ours:
        raise BadInput(f"{target}: another qembed quantize is writing it")


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _remove(partial: Path) -> None:
    """Clear `partial` away, the lock last, so that no other run begins in it meanwhile."""
    with suppress(OSError):
        _empty(partial)
        (partial / "lock").unlink()
        partial.rmdir()
