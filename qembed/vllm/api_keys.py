"""API keys: reading them, and checking a request's. Only their hashes leave the process that reads them."""

from __future__ import annotations

import hashlib
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from qembed.errors import BadInput

VARIABLE = "QEMBED_API_KEY"
MIN_LENGTH = 8


def find(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys in `file`, one per line with # for comments, or else in QEMBED_API_KEY, separated by commas.

    Raises:
        BadInput: the file is unreadable or has no key, or a key is too short or not ASCII.
    """
    if file is None:
        variable = environment.get(VARIABLE)
        if not variable:
            return ()
        source, lines = VARIABLE, variable.split(",")
    else:
        source = str(file)
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{source}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise BadInput(f"{source}: no key in it")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise BadInput(f"{source}: key {number} is not at least {MIN_LENGTH} printable ASCII characters without spaces")
    return keys


def first(file: Path | None) -> str | None:
    """The key that a client sends: the first in `file`; None without a file.

    Raises:
        BadInput: as `find` does.
    """
    return None if file is None else find(file, {})[0]


def is_exposed(file: Path) -> bool:
    """Whether every user of this machine can read `file`."""
    return bool(file.stat().st_mode & stat.S_IROTH)


def hashed(key: str) -> str:
    """SHA-256 of `key`, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_known(authorization: str | None, hashes: Iterable[str]) -> bool:
    """Whether the header "Bearer KEY" has one of the keys. The comparison takes constant time."""
    scheme, _, key = (authorization or "").partition(" ")
    key_hash = hashed(key.strip())
    known = False
    for known_hash in hashes:
        known |= secrets.compare_digest(key_hash, known_hash)
    return known and scheme.lower() == "bearer"
