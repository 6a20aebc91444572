"""A cache of computed vectors: one SQLite file per model, settings and machine, one row per text.

Each write is durable, whatever ends the run. The `key` names everything that a vector depends on besides its text, so vectors
of another model, dtype, engine or version are never mixed up.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput, QembedError

BATCH = 1024
TABLES = (
    "CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
)


def default_folder() -> Path:
    """The default folder: `qembed/eval` in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qembed" / "eval"


def digest(text: str) -> bytes:
    """The cache key of a text, 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Cache:
    """The vectors of one key, float32, by digest of the text."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path = connection, path

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """The subset of `digests` with a vector in the cache."""
        known: set[bytes] = set()
        for start in range(0, len(digests), BATCH):
            batch = digests[start : start + BATCH]
            placeholders = ",".join("?" * len(batch))
            known.update(row[0] for row in self._run(f"SELECT text FROM vectors WHERE text IN ({placeholders})", batch))
        return known

    def put(self, digests: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        """Store `vectors` [n, d]; they are on disk when this returns."""
        rows = zip(digests, (row.tobytes() for row in np.ascontiguousarray(vectors, "<f4")), strict=True)
        with self._errors_named(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    def fill(self, digests: Sequence[bytes], out: NDArray[np.float32]) -> None:
        """Write the vector of each of `digests` into the corresponding row of `out` [n, d].

        Raises:
            KeyError: a digest has no vector in the cache.
            QembedError: a vector has another length.
        """
        for start in range(0, len(digests), BATCH):
            batch = digests[start : start + BATCH]
            placeholders = ",".join("?" * len(batch))
            vectors = dict(self._run(f"SELECT text, vector FROM vectors WHERE text IN ({placeholders})", batch))
            for row, text_digest in enumerate(batch, start):
                vector = np.frombuffer(vectors[text_digest], "<f4")
                if len(vector) != out.shape[1]:
                    raise QembedError(f"vectors of {len(vector)} and of {out.shape[1]} dimensions from one model")
                out[row] = vector

    def dimension(self, text_digest: bytes) -> int:
        """The length of the vector of a known digest."""
        ((size,),) = self._run("SELECT length(vector) FROM vectors WHERE text = ?", [text_digest])
        return int(size) // 4

    def count(self) -> int:
        """The number of vectors."""
        ((count,),) = self._run("SELECT count(*) FROM vectors", [])
        return int(count)

    def note(self, name: str, value: Any) -> None:
        """Store metadata as JSON."""
        with self._errors_named(), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    def read_note(self, name: str) -> Any:
        """Metadata stored by `note`, or None."""
        rows = self._run("SELECT value FROM notes WHERE name = ?", [name])
        return json.loads(rows[0][0]) if rows else None

    def clear(self) -> None:
        """Delete everything."""
        with self._errors_named(), self._connection:
            self._connection.execute("DELETE FROM vectors")
            self._connection.execute("DELETE FROM notes")

    def _run(self, statement: str, values: Sequence[Any]) -> list[Any]:
        with self._errors_named():
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise QembedError(f"{self._path}: {error}; name another folder with --cache, or use --no-cache") from error
        except sqlite3.DatabaseError as error:
            raise BadInput(f"{self._path}: a damaged cache ({error}); delete it: its vectors are computed again") from error


@contextmanager
def opened(folder: Path | None, key: Mapping[str, Any]) -> Iterator[Cache]:
    """The cache of `key` in `folder`, created if needed; None: a temporary cache that is deleted with the block.

    Raises:
        BadInput: the folder cannot be created, or the file is not a cache.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="qembed-eval-") as temporary, opened(Path(temporary), key) as cache:
            yield cache
        return
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{name}.sqlite"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{folder}: no place for a cache ({reason}); name another with --cache, or use --no-cache") from error
    cache = Cache(connection, path)
    try:
        for table in TABLES:
            cache._run(table, [])
        cache.note("key", dict(key))
        yield cache
    finally:
        connection.close()
