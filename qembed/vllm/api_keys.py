"""API keys: reading them, and checking a request's. Only their hashes leave the process that reads them."""

from __future__ import annotations

import hashlib
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from qembed.errors import BadInput

VARIABLE = "QEMBED_API_KEY"
MIN_LENGTH = 8
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


def named(file: Path | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The name of each key ("": it has none) in `file`, or else in QEMBED_API_KEY, where keys are separated by commas.

    A line of the file is KEY or NAME:KEY; # begins a comment line. A key that has a colon needs a name, or a colon before it.

    Raises:
        BadInput: the file is unreadable or has no key; a key is too short, not ASCII, or there with two names; a name has other
            characters than letters, digits, dots, dashes and underscores; or QEMBED_API_KEY is set and empty.
    """
    if file is None:
        variable = environment.get(VARIABLE)
        if variable is None:
            return {}
        source, lines = VARIABLE, [f":{key.strip()}" for key in variable.split(",") if key.strip()]
    else:
        source = str(file)
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{source}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate((line for text in lines if (line := text.strip()) and not line.startswith("#")), 1):
        name, _, key = map(str.strip, line.partition(":")) if ":" in line else ("", "", line)
        if name and not NAME.fullmatch(name):
            raise BadInput(
                f"{source}: key {number}: what stands before its colon is no name of letters, digits, dots, dashes and "
                "underscores; write NAME:KEY, or :KEY for a key that has a colon itself"
            )
        if len(key) < MIN_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise BadInput(f"{source}: key {number} is not at least {MIN_LENGTH} printable ASCII characters without spaces")
        if keys.setdefault(key, name) != name:
            raise BadInput(f"{source}: key {number} is there before with another name")
    if not keys:
        hint = "; unset it to serve without keys" if file is None else ""
        raise BadInput(f"{source}: no key in it{hint}")
    return keys


def first(file: Path | None) -> str | None:
    """The key that a client sends: the first in `file`; None without a file.

    Raises:
        BadInput: as `find` does.
    """
    return None if file is None else find(file, {})[0]


def find(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of `named`, without their names."""
    return tuple(named(file, environment))


def readers(file: Path) -> str | None:
    """Who can read `file` besides its owner: "every user of this machine", "its group", or None."""
    mode = file.stat().st_mode
    if mode & stat.S_IROTH:
        return "every user of this machine"
    return "its group" if mode & stat.S_IRGRP else None


class KeyFile:
    """A file of keys that may be replaced while the server runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None

    def changed(self) -> bool:
        """Whether the file, or what it links to, is another than at the last call (true at the first one).

        A missing file has not changed.
        """
        stamp = self._current()
        if stamp is None or stamp == self._stamp:
            return False
        self._stamp = stamp
        return True

    def _current(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def hashes(keys: Mapping[str, str]) -> dict[str, str | None]:
    """The name of each key by its hash; `keys` are names by key."""
    return {hashed(key): name for key, name in keys.items()}


def hashed(key: str) -> str:
    """SHA-256 of `key`, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def matching(authorization: str | None, hashes: Iterable[str]) -> str | None:
    """The hash, among `hashes`, of the key in the header "Bearer KEY"; None if it is not there. Takes constant time."""
    scheme, _, key = (authorization or "").partition(" ")
    key_hash = hashed(key.strip())
    match: str | None = None
    for known_hash in hashes:
        if secrets.compare_digest(key_hash, known_hash):
            match = known_hash
    return match if scheme.lower() == "bearer" else None
