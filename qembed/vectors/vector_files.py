"""Files of vectors computed elsewhere: `.npy`, or Parquet with a column of vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qembed.errors import BadInput
from qembed.text.texts import Text
from qembed.vectors import dtypes, parquet

MATCHED_BY = ("id", "text")
SHOWN = 3


@dataclass(frozen=True)
class VectorFile:
    """A file of vectors [n, d], in float32 or as memory-mapped floats; `dtype` is the format in the file.

    `keys` are the values [n] of the column `matched_by` ("id" or "text"), each of which names one vector. None: vectors and
    texts are in the same order.
    """

    path: Path
    vectors: NDArray[np.floating[Any]]
    dtype: str
    matched_by: str | None = None
    keys: Sequence[str] | None = None

    def of(self, texts: Sequence[Text]) -> NDArray[np.floating[Any]]:
        """The vectors [len(texts), d] of `texts`, in their order.

        Raises:
            BadInput: the number of vectors and texts differs, a text has no vector, or two texts have the same id.
        """
        if self.keys is None or self.matched_by is None:
            if len(self.vectors) != len(texts):
                raise BadInput(
                    f"{self.path}: {len(self.vectors)} vectors for {len(texts)} texts; they belong together row by row"
                    " (name the texts with --data)"
                )
            return self.vectors
        keys = [getattr(text, self.matched_by) for text in texts]
        if self.matched_by == "id" and (repeated := _repeated(keys)):
            raise BadInput(f"{self.path} is matched by id, and {len(repeated)} ids name more than one text: {_shown(repeated)}")
        rows = {key: row for row, key in enumerate(self.keys)}
        if missing := [key for key in keys if key not in rows]:
            raise BadInput(
                f"{self.path}: no vector for {len(missing)} of {len(keys)} texts, by {self.matched_by}: {_shown(missing)}"
            )
        order = [rows[key] for key in keys]
        return self.vectors if order == list(range(len(self.vectors))) else self.vectors[order]


def read(path: Path) -> VectorFile:
    """The vectors of `path`: `.npy` with an array [n, d], or `.parquet` with a column `vector` or `embedding` of lists.

    A Parquet column `id`, or else `text`, assigns vectors to texts; without one, and in `.npy`, they are in the order of the
    texts. int8 and binary vectors become float32; an array of floats is memory-mapped, not loaded.

    Raises:
        BadInput: the file cannot be read, has other content, or two of its rows have the same id.
        MissingExtra: Parquet without pyarrow.
    """
    kind = path.suffix.lower()
    if kind == ".npy":
        return _array(path)
    if kind in (".parquet", ".pq"):
        return _table(path)
    raise BadInput(
        f"{path}: vectors are read from .npy (an array [texts, dimensions]) and .parquet (a column 'vector'),"
        " both of which qembed embed writes"
    )


def texts_of(first: VectorFile, second: VectorFile) -> list[Text]:
    """What two files of vectors have in common, where no texts are given: their ids or texts, or else their row numbers.

    Raises:
        BadInput: one has keys that the other lacks.
    """
    named = next((file for file in (first, second) if file.keys is not None), None)
    if named is None or named.keys is None:
        return [Text(f"row {row}", f"row {row}") for row in range(1, len(first.vectors) + 1)]
    if first.matched_by == second.matched_by and first.keys is not None and second.keys is not None:
        for one, other in ((first, second), (second, first)):
            assert one.keys is not None
            assert other.keys is not None
            if missing := sorted(set(other.keys) - set(one.keys)):
                raise BadInput(
                    f"{one.path}: no vector for {len(missing)} of the {len(other.keys)} in {other.path.name},"
                    f" by {one.matched_by}: {_shown(missing)}; name the texts to compare with --data"
                )
    return [Text(key, key) for key in named.keys]


def _array(path: Path) -> VectorFile:
    try:
        # Pickled objects could run code, so they are not read.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise BadInput(f"{path}: not a .npy array: {' '.join(str(error).split())[:120]}") from error
    needed = f"{path}: an array [texts, dimensions] of floats or int8 is needed"
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not array.size:
        raise BadInput(f"{needed}, this has the shape {getattr(array, 'shape', None)}")
    if array.dtype == np.uint8:
        raise BadInput(
            f"{needed}, this is uint8, and .npy does not tell whether these are packed bits; embed into .parquet, which does"
        )
    if array.dtype.kind != "f" and array.dtype != np.int8:
        raise BadInput(f"{needed}, this is {array.dtype}")
    return VectorFile(path, dtypes.decode(array, "int8") if array.dtype == np.int8 else array, str(array.dtype))


def _table(path: Path) -> VectorFile:
    with parquet.opened(path) as file:
        column = parquet.vector_column(file, path)
        matched_by = next((name for name in MATCHED_BY if name in file.schema_arrow.names), None)
        rows = file.metadata.num_rows
        if not rows:
            raise BadInput(f"{path}: holds no vectors")
        vectors = np.empty((rows, column.dimensions), np.float32)
        keys: list[str] = []
        done = 0
        for batch in file.iter_batches(columns=[column.name, *([matched_by] if matched_by else [])]):
            block = parquet.vectors(batch.column(column.name), column, path, done)
            keys += parquet.ids(batch.column(matched_by), path, done) if matched_by else []
            vectors[done : done + len(block)] = block
            done += len(block)
    if matched_by is None:
        return VectorFile(path, vectors, column.dtype)
    _check_keys(keys, vectors, matched_by, path)
    return VectorFile(path, vectors, column.dtype, matched_by, keys)


def _check_keys(keys: Sequence[str], vectors: NDArray[np.float32], matched_by: str, path: Path) -> None:
    """Refuse keys that name more than one vector. A text may be repeated if its vectors are equal."""
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        before = first.setdefault(key, row)
        if before != row and (matched_by == "id" or not np.array_equal(vectors[before], vectors[row], equal_nan=True)):
            raise BadInput(
                f"{path}: {len(_repeated(keys))} {matched_by}s stand in more than one row, first {key[:40]!r} in rows"
                f" {before + 1} and {row + 1}; each is to have one vector"
            )


def _repeated(keys: Iterable[str]) -> list[str]:
    return [key for key, count in Counter(keys).items() if count > 1]


def _shown(keys: Sequence[str]) -> str:
    return ", ".join(repr(key[:40]) for key in keys[:SHOWN])
