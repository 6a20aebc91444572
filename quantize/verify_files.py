"""The files of a finished checkpoint compared with its manifest: hashes, missing and unlisted files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qembed.checkpoint import model_card
from qembed.checkpoint.description import MANIFEST
from qembed.checkpoint.files import check_file, read_bytes, read_json
from qembed.errors import BadInput
from qembed.files import sha256
from qembed.quantize import manifest

OnStep = Callable[[str, int, int], None]


@dataclass
class FileReport:
    """What the files of a checkpoint are like.

    Attributes:
        findings: problems, one line each.
        notes: unlisted hidden files, one line each.
        manifest: the contents of qembed.json; None if it is missing, damaged or changed, so that nothing in it can be trusted.
        hashed: number of files whose hash was compared.
    """

    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifest: Mapping[str, Any] | None = None
    hashed: int = 0


def check_files(folder: Path, on_step: OnStep) -> FileReport:
    """Compare the files in `folder` with the hashes in its manifest. Problems are reported, not raised."""
    report, path = FileReport(), folder / MANIFEST
    if not path.exists():
        report.findings.append(f"{path}: missing; was the checkpoint written by qembed quantize?")
        return report
    try:
        contents = read_json(path, folder)
    except BadInput as error:
        report.findings.append(str(error))
        return report
    hashes, card = contents.get("files"), contents.get("model_card")
    if manifest.is_sealed(contents):
        report.manifest = contents
    else:
        report.findings.append(f"{path}: changed since it was written (its own SHA-256 differs or is missing)")
    if not isinstance(hashes, dict) or not hashes:
        report.findings.append(f"{path}: without hashes of the files")
        hashes = {}
    total = len(hashes) + 1
    for number, (name, digest) in enumerate(sorted(hashes.items()), 1):
        report.findings += _check_hash(folder, name, digest)
        on_step("hashing files", number, total)
    report.findings += _check_card(folder / model_card.FILE, card)
    on_step("hashing files", total, total)
    report.hashed = total
    for line, is_problem in _unlisted(folder, {*hashes, MANIFEST, model_card.FILE}):
        (report.findings if is_problem else report.notes).append(line)
    return report


def _check_hash(folder: Path, name: str, digest: object) -> Iterator[str]:
    """The problem of the file `name`, if it has one."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        yield f"{folder / MANIFEST}: names a file outside the folder: {name!r}"
        return
    path = folder / name
    try:
        if not path.exists():
            yield f"{path}: missing"
            return
        check_file(path, folder)
        if sha256(path) != digest:
            yield f"{path}: changed since it was written (SHA-256 differs from {MANIFEST})"
    except BadInput as error:
        yield str(error)
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror or error}"


def _check_card(path: Path, digest: object) -> Iterator[str]:
    """The problem of the model card, if it has one; its measured section, which `qembed eval --card` replaces, is left out."""
    try:
        if not path.exists():
            yield f"{path}: missing"
        elif model_card.digest(read_bytes(path, path.parent)) != digest:
            yield f"{path}: changed since it was written (SHA-256 differs from {MANIFEST})"
    except BadInput as error:
        yield str(error)


def _unlisted(folder: Path, listed: set[str]) -> Iterator[tuple[str, bool]]:
    """A line for each file that is not `listed`, and whether it is a problem: hidden files are none.

    Hidden folders, such as those of git and of the hub's client, are left out.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_folder = path.is_dir() and not path.is_symlink()
        if str(name) in listed or is_folder or any(part.startswith(".") for part in name.parts[:-1]):
            continue
        yield f"{path}: not part of the checkpoint", not path.name.startswith(".")
