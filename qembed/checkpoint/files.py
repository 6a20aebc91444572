"""Reading a checkpoint's files. Damage, and files that are not what they look like, are reported as bad input.

The author of a checkpoint is not trusted: a link may lead to a file of the user's, a pipe or device has no end, and a file of
JSON may be larger than the memory. So every file that is read or copied is a regular one, of bounded size unless it holds
tensors, and lies in the checkpoint's folder. Only links into the hub's cache are followed: a model in that cache is a folder
of links to `blobs/`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qembed.errors import BadInput

LARGEST_JSON = 2**24
"""Bytes of a file of settings. The largest that are known have 200 KB."""
LARGEST_FILE = 2**27
"""Bytes of any other file without tensors. The largest that are known are tokenizers, of 33 MB."""
LARGE = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")
"""Files of JSON that may be as large as LARGEST_FILE."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
LOADED = (*WEIGHTS, ".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
"""Suffixes of files that loaders read because they are there: an unlisted one can change the model."""
COPIED = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "modules.json",
    "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
    "LICENSE*",
    "NOTICE",
)
"""Files that belong to a checkpoint besides its own weights and its config.json; those of dense modules are among them."""
READ = (*(f"*{suffix}" for suffix in LOADED), *(f"[0-9]_*/*{suffix}" for suffix in LOADED), *COPIED, "README.md")
"""All files of a checkpoint that something reads."""


def check_folder(folder: Path) -> None:
    """Check every file of the checkpoint in `folder` that something may read, before a library gets to read it.

    Raises:
        BadInput: one is no regular file, too large, or leads out of the folder; the message names it.
    """
    for problem in unsafe_files(folder):
        raise BadInput(problem)


def unsafe_files(folder: Path) -> Iterator[str]:
    """A line for each file of the checkpoint in `folder` that must not be read; see `check_file`."""
    for path in matching(folder, READ):
        try:
            check_file(path, folder)
        except BadInput as error:
            yield str(error)


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """What `folder` has under one of the `patterns`, sorted; a folder LICENSES is nothing that anybody reads."""
    try:
        modules = [path for path in folder.glob("[0-9]_*") if path.is_dir()]
        paths = [path for place in (folder, *modules) for path in place.iterdir()]
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot be read: {error.strerror}") from error
    return sorted(
        path
        for path in paths
        if any(fnmatchcase(path.relative_to(folder).as_posix(), pattern) for pattern in patterns)
        and not (path.name.startswith("LICENSE") and path.is_dir())
    )


def check_file(path: Path, folder: Path | None = None, *, largest: int | None = None) -> None:
    """Check that `path` is a regular file of at most `largest` bytes (None: by its name), in `folder` if that is given.

    Raises:
        BadInput: it cannot be read, is a folder, device, pipe or socket, is too large, or a link leads out of `folder`.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = "the file that it links to is missing" if path.is_symlink() else getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: cannot be read: {reason}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{path}: cannot be read: not a regular file")
    if folder is not None and not _is_own(path, folder):
        raise BadInput(
            f"{path}: leads out of its folder, to {path.resolve()}; put a copy of that file in its place if you trust it"
        )
    limit = limit_of(path) if largest is None else largest
    if limit is not None and status.st_size > limit:
        raise BadInput(f"{path}: {status.st_size:,} bytes; at most {limit:,} are read")


def limit_of(path: Path) -> int | None:
    """The largest size in bytes of a checkpoint's file of that name; None for files of tensors, which are never read whole."""
    if path.suffix in WEIGHTS:
        return None
    return LARGEST_JSON if path.suffix == ".json" and path.name not in LARGE else LARGEST_FILE


def read_bytes(path: Path, folder: Path | None = None, *, largest: int | None = None) -> bytes:
    """The content of a file that `check_file` accepts.

    Raises:
        BadInput: as `check_file`.
    """
    check_file(path, folder, largest=largest)
    limit = limit_of(path) if largest is None else largest
    try:
        # Not blocked by a pipe that has taken the file's place meanwhile.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return file.read(-1 if limit is None else limit)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def open_tensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """An open safetensors file; damage is reported as BadInput. Framework "np" reads headers without importing torch."""
    from safetensors import SafetensorError, safe_open

    check_file(path, path.parent)
    try:
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except SafetensorError as error:
        raise BadInput(f"{path}: damaged safetensors file: {error}") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path, folder: Path | None = None, *, largest: int | None = None) -> dict[str, Any]:
    """The object in `path`; `folder` and `largest` as for `check_file`.

    Raises:
        BadInput: it cannot be read, is not JSON, or is no object.
    """
    value = read_json_value(path, folder, largest=largest)
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object")
    return value


def read_json_value(path: Path, folder: Path | None = None, *, largest: int | None = None) -> Any:
    """What the JSON in `path` stands for; `folder` and `largest` as for `check_file`.

    Raises:
        BadInput: it cannot be read, or is not JSON.
    """
    content = read_bytes(path, folder, largest=largest)
    try:
        return json.loads(content.decode())
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise BadInput(f"{path}: not JSON: nested too deeply") from error


def _is_own(path: Path, folder: Path) -> bool:
    """Whether `path` lies in `folder`, or is a link of the hub's cache to one of the cache's own files."""
    target, root = path.resolve(), folder.resolve()
    if root in target.parents:
        return True
    if root.parent.name == "snapshots" and target.parent == root.parents[1] / "blobs":
        return True
    if target.parent.name != "blobs":
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).resolve() == target.parents[2]
