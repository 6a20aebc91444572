"""The files and folders that a command writes: checked before the work, so that nothing of the user's is lost.

One rule for all commands: a target is never an input, never the same file as another target, and never a device or pipe; an
existing file is replaced only with --force. Two names are the same file if the file system says so, whatever they look like
(symbolic and hard links, `./`, another case on a file system that ignores case, another mount).
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from qembed.errors import BadInput


@dataclass(frozen=True)
class Target:
    """A file that a command writes, and the option that decides its name."""

    path: Path
    option: str = "--output"


def check_targets(targets: Sequence[Target], inputs: Iterable[Path] = (), *, force: bool) -> None:
    """Check that writing `targets` loses nothing. Without `force` they must be new.

    `inputs` are files and folders that the command reads. All files below such a folder count as inputs, but a new file may be
    written into it.

    Raises:
        BadInput: a target is an input or another target, is no regular file, exists (without `force`), or has no folder.
    """
    sources = list(inputs)
    for target in targets:
        _check_kind(target)
    for first, second in combinations(targets, 2):
        if is_same_file(first.path, second.path):
            names = first.option if first.option == second.option else f"{first.option} and {second.option}"
            raise BadInput(f"{names}: {first.path} and {second.path} are the same file; give each its own name")
    existing = [target for target in targets if target.path.exists()]
    for target in existing:
        for source in sources:
            _check_not_input(target, source)
    if existing and not force:
        raise BadInput(already_exists(existing[0].path, existing[0].option))


def check_folder(folder: Path, inputs: Iterable[Path], option: str = "--output") -> None:
    """Check that writing or replacing the whole `folder` loses none of `inputs`, and that none of them would include it.

    Raises:
        BadInput: the folder is an input, contains one, is inside one, or is named by `.`, `..` or `/` alone.
    """
    check_name(folder, "folder", option)
    for source in inputs:
        if not source.exists():
            continue
        if is_same_file(folder, source):
            raise BadInput(f"{option} {folder}: is the input {source}; choose another {option}")
        if is_inside(source, folder):
            raise BadInput(f"{option} {folder}: contains the input {source}, which would be lost; choose another {option}")
        if source.is_dir() and is_inside(folder, source):
            raise BadInput(f"{option} {folder}: is inside the input {source}; choose another {option}")


def check_name(target: Path, kind: str, option: str = "--output") -> None:
    """Check that `target`, a "file" or "folder", has a name: other names are made of it, and beside it stands what is written.

    Raises:
        BadInput: it is `.`, `..` or `/`, or ends in `..`.
    """
    if target.name in ("", ".."):
        raise BadInput(f"{option} {target}: has no name of its own; name the {kind} that is to be written")


def already_exists(path: Path, option: str = "--output") -> str:
    """The message for a target that exists, without --force."""
    return f"{path} exists already; choose another {option}, or --force to replace it"


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two paths name the same file, which need not exist yet.

    Names of new files in one folder that differ only in case or Unicode normal form count as the same: on some file systems
    they are.
    """
    try:
        return first.samefile(second)
    except OSError:
        if first.exists() or second.exists():
            return False
    try:
        return first.parent.samefile(second.parent) and _folded(first.name) == _folded(second.name)
    except OSError:
        return False


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is somewhere below `folder`."""
    try:
        wanted = folder.stat()
        parents = path.resolve().parents
        return any(parent.exists() and os.path.samestat(parent.stat(), wanted) for parent in parents)
    except OSError:
        return False


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _check_kind(target: Target) -> None:
    """Refuse what cannot be replaced by a file: folders, devices, pipes, sockets, links that lead nowhere."""
    path, option = target.path, target.option
    if not path.parent.is_dir():
        raise BadInput(f"{option} {path}: there is no folder {path.parent}; create it first")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            raise BadInput(f"{option} {path}: a link that leads to no file; remove it, or choose another {option}") from error
        if not isinstance(error, FileNotFoundError):
            raise BadInput(f"{option} {path}: cannot be written: {error.strerror}") from error
        return
    if stat.S_ISDIR(mode):
        raise BadInput(f"{option} {path}: a folder; choose another {option}")
    if not stat.S_ISREG(mode):
        raise BadInput(f"{option} {path}: a device, pipe or socket, which --force does not replace; choose another {option}")


def _check_not_input(target: Target, source: Path) -> None:
    if is_same_file(target.path, source):
        raise BadInput(f"{target.option} {target.path}: is the input {source}, which would be lost; choose another name")
    if source.is_dir() and is_inside(target.path, source):
        raise BadInput(f"{target.option} {target.path}: belongs to the input {source}, and would be lost; choose another name")
