"""API keys: where they come from, and whether a request has one. Only their hashes leave the process that read them."""

from __future__ import annotations

import hashlib
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from qembed.errors import BadInput

VARIABLE = "QEMBED_API_KEY"
SHORTEST = 8


def find(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys in `file`, one a line, or else in QEMBED_API_KEY, with commas between. Lines that begin with # are comments.

    Raises:
        BadInput: the file cannot be read, or holds no key, or one that is too short or not ASCII.
    """
    if file is None:
        given = environment.get(VARIABLE)
        if not given:
            return ()
        where, lines = VARIABLE, given.split(",")
    else:
        where = str(file)
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{where}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise BadInput(f"{where}: no key in it")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise BadInput(f"{where}: key {number} is not at least {SHORTEST} printable ASCII characters without spaces")
    return keys


def is_exposed(file: Path) -> bool:
    """Whether every user of this machine may read `file`."""
    return bool(file.stat().st_mode & stat.S_IROTH)


def hashed(key: str) -> str:
    """SHA-256 of `key`, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_known(authorization: str | None, hashes: Iterable[str]) -> bool:
    """Whether the header "Bearer KEY" holds one of the keys. Takes the same time whichever key it is, or none."""
    scheme, _, key = (authorization or "").partition(" ")
    given = hashed(key.strip())
    known = False
    for one in hashes:
        known |= secrets.compare_digest(given, one)
    return known and scheme.lower() == "bearer"
