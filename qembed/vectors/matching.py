"""Stored vectors and the texts that they belong to: matched by id, by text, or by their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput
from qembed.text.display import counted
from qembed.text.texts import Text

SHOWN = 3
NONE = -1
"""The row of a text without a vector."""

Vectors = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class VectorFile:
    """A file of vectors [n, d], in float32 or as memory-mapped floats; `dtype` is the format in the file.

    `keys` are the values [n] of the column `matched_by` ("id" or "text"), each of which names one vector. None: vectors and
    texts are in the same order.
    """

    path: Path
    vectors: Vectors
    dtype: str
    matched_by: str | None = None
    keys: Sequence[str] | None = None

    def rows(self, texts: Sequence[Text]) -> NDArray[np.intp]:
        """The row [len(texts)] of each text's vector, NONE where the file has no vector of it.

        Raises:
            BadInput: no text has a vector, two texts have the same id, or without keys the numbers of vectors and texts differ.
        """
        if self.keys is None or self.matched_by is None:
            if len(self.vectors) != len(texts):
                sizes = f"{counted(len(self.vectors), 'vector')} for {counted(len(texts), 'text')}"
                raise BadInput(
                    f"{self.path}: {sizes}; they belong together row by row"
                    " (name the texts with --data; if qembed embed rejected rows, put its file of ids beside the vectors)"
                )
            return np.arange(len(texts))
        keys = [getattr(text, self.matched_by) for text in texts]
        if self.matched_by == "id" and (repeated := repeated_keys(keys)):
            raise BadInput(f"{self.path} is matched by id, and several texts have one id: {_shown(repeated)}")
        row_of_key = {key: row for row, key in enumerate(self.keys)}
        rows = np.array([row_of_key.get(key, NONE) for key in keys], np.intp)
        if not (rows != NONE).any():
            raise BadInput(
                f"{self.path}: no vector for any of {len(keys)} texts, by {self.matched_by}: it has {_shown(self.keys)},"
                f" the texts have {_shown(keys)} (name the texts with --data, and their ids with --id-column)"
            )
        return rows


@dataclass(frozen=True)
class Match:
    """The texts that have a vector in each of several files.

    Attributes:
        texts: these texts, in their order.
        vectors: of each file, [len(texts), d].
        without_vector: for each file, the number of texts that it has no vector of.
        unused: for each file, the number of its vectors that belong to none of the texts.
    """

    texts: list[Text]
    vectors: Mapping[str, Vectors]
    without_vector: Mapping[str, int]
    unused: Mapping[str, int]


def match(texts: Sequence[Text], files: Mapping[str, VectorFile]) -> Match:
    """Match `texts` with the vectors of `files`, which are called by name in the result.

    Raises:
        BadInput: a file belongs to other texts (`VectorFile.rows`), or no text has a vector in every file.
    """
    rows = {name: file.rows(texts) for name, file in files.items()}
    present = np.ones(len(texts), bool)
    for rows_of_file in rows.values():
        present &= rows_of_file != NONE
    if not present.any():
        raise BadInput(f"no text has a vector in both {' and '.join(str(file.path) for file in files.values())}")
    return Match(
        [texts[place] for place in np.flatnonzero(present)],
        {name: _taken(file.vectors, rows[name][present]) for name, file in files.items()},
        {name: int((rows[name] == NONE).sum()) for name in files},
        {name: _unused(file, rows[name]) for name, file in files.items()},
    )


def texts_of(first: VectorFile, second: VectorFile) -> list[Text]:
    """The texts of two files of vectors where none are given: all their ids or texts, or else row numbers."""
    keys = [*(first.keys or ()), *((second.keys or ()) if first.matched_by in (None, second.matched_by) else ())]
    if not keys:
        return [Text(f"row {row}", f"row {row}") for row in range(1, len(first.vectors) + 1)]
    return [Text(key, key) for key in dict.fromkeys(keys)]


def repeated_keys(keys: Iterable[str]) -> list[str]:
    """The keys that occur more than once."""
    return [key for key, count in Counter(keys).items() if count > 1]


def _taken(vectors: Vectors, rows: NDArray[np.intp]) -> Vectors:
    """The vectors at `rows`, without a copy if these are all of them in their order."""
    return vectors if np.array_equal(rows, np.arange(len(vectors))) else vectors[rows]


def _unused(file: VectorFile, rows: NDArray[np.intp]) -> int:
    if file.keys is None:
        return 0
    return len(set(file.keys)) - len(np.unique(rows[rows != NONE]))


def _shown(keys: Sequence[str]) -> str:
    more = ", …" if len(keys) > SHOWN else ""
    return ", ".join(repr(key[:40]) for key in keys[:SHOWN]) + more
