"""An index on disk: NAME in FAISS's format, and NAME.ids.parquet with the ids and other columns, row for row.

The second file records the SHA-256 of the first, so that damage or a mix-up is detected before FAISS, which does not validate
its input, reads the index. Both are written under temporary names and then renamed, the index first. If a run ends between the
two renames, the finished ids file is still there, and the next reader renames it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qembed.errors import BadInput, QembedError
from qembed.files import sha256, sync_path
from qembed.parquet import file as parquet
from qembed.search import corpus as corpora
from qembed.search.build import KINDS, Kind
from qembed.search.corpus import ABOUT_INDEX, Corpus
from qembed.text.rows.arrow import UNDECODABLE, python_values
from qembed.text.rows.values import storable
from qembed.vectors import ivf
from qembed.vectors.parquet import METADATA, metadata

FORMAT = 1


@dataclass(frozen=True)
class Store:
    """An index in memory.

    `about` is its own metadata, `source` that of `qembed embed` for the vectors. `columns` lie beside the ids; `texts` are the
    columns of strings.
    """

    path: Path
    index: Any
    about: Mapping[str, Any]
    source: Mapping[str, Any]
    columns: Sequence[str]
    texts: Sequence[str]

    @property
    def kind(self) -> Kind:
        """Flat, IVF-Flat or HNSW."""
        kind: Kind = self.about["kind"]
        return kind

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return int(self.about["rows"])

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return int(self.about["dimensions"])

    @property
    def model(self) -> str | None:
        """The model of the vectors; None if unknown."""
        name = self.source.get("model")
        return name if isinstance(name, str) and name else None

    def entries(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """The values of `columns` for each of `rows`, in that order, ready for JSON; reads only the row groups that hold them.

        A string that is not UTF-8 is U+FFFD.
        """
        with parquet.opened(ids_path(self.path)) as file:
            sizes = [group.rows for group in file.groups]
            ends = np.cumsum(sizes)
            entries: dict[int, dict[str, Any]] = {}
            for group in np.unique(np.searchsorted(ends, list(rows), side="right")):
                start = int(ends[group]) - sizes[group]
                inside = sorted({row for row in rows if start <= row < ends[group]})
                batch = file.take(int(group), columns, [row - start for row in inside])
                values = (_values(batch.column(name), name in file.uuids) for name in columns)
                entries.update(
                    zip(inside, (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)), strict=True)
                )
        return [entries[row] for row in rows]


def _values(column: Any, is_uuid: bool) -> list[Any]:
    return ["\ufffd" if value is UNDECODABLE else storable(value) for value in python_values(column, is_uuid)]


def ids_path(path: Path) -> Path:
    """The file with the ids and other columns of the index `path`."""
    return path.parent / f"{path.name}{corpora.IDS}"


def check(path: Path) -> None:
    """Check that `path` is a name for an index in a writable folder, beyond what `targets.check_targets` checks of any file.

    Raises:
        BadInput: its folder is read-only, or its suffix belongs to another kind of file.
    """
    if path.suffix.lower() in (".parquet", ".npy", ".csv", ".jsonl"):
        raise BadInput(f"-o {path}: the output is a FAISS index; name it {path.stem}.faiss")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"-o {path}: {path.parent} is not writable")


def write(path: Path, index: Any, corpus: Corpus, about: Mapping[str, Any], on_stage: Callable[[str, int], None]) -> None:
    """Write both files; existing ones are replaced atomically.

    Raises:
        QembedError: they cannot be written; existing files are unchanged.
        BadInput: the file of vectors is damaged.
    """
    partials = [_partial(path), _partial(ids_path(path))]
    try:
        on_stage("writing the index", 0)
        _write_index(index, partials[0])
        metadata = {
            "format": FORMAT,
            **about,
            "rows": corpus.rows,
            "dimensions": corpus.dimensions,
            "sha256": sha256(partials[0]),
        }
        on_stage("writing the ids", 0)
        _write_ids(partials[1], corpus, metadata, on_stage)
        os.replace(partials[0], path)
        *_, ids = partials
        partials.clear()  # the ids now belong to the new index; `read` finds them under either name
        os.replace(ids, ids_path(path))
    except OSError as error:
        raise QembedError(f"{path}: cannot be written: {error.strerror or _words(error)}") from error
    finally:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink()


def read(path: Path) -> Store:
    """Read the index at `path`.

    Raises:
        BadInput: it is missing, damaged or not written by qembed, or its ids are missing or belong to another index.
        QembedError: it does not fit into free memory.
    """
    from qembed.vllm import machine

    if not path.is_file():
        raise BadInput(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'}; make an index with: qembed index OUT.parquet -o {path}"
        )
    names = [ids_path(path), _partial(ids_path(path))]
    if not any(name.is_file() for name in names):
        raise BadInput(f"{path}: {names[0].name} is missing: it holds the ids and must lie beside the index")
    try:
        digest = sha256(path)
        for name in names:
            if not name.is_file():
                continue
            schema, rows = _described(name)
            about = metadata(schema, ABOUT_INDEX, name)
            if about.get("sha256") == digest:
                break
        else:
            raise BadInput(
                f"{path}: damaged, or not the index that {names[0].name} belongs to; make it again with qembed index"
            )
        if about.get("format") != FORMAT or about.get("kind") not in KINDS:
            raise BadInput(f"{path}: written by another version of qembed; make it again with qembed index")
        if name != names[0]:
            os.replace(name, names[0])
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or _words(error)}") from error
    free = machine.host().free
    if free is not None and path.stat().st_size > free:
        raise QembedError(f"{path}: {path.stat().st_size / 1e9:.1f} GB must fit into memory, {free / 1e9:.1f} GB are free")
    index = _read_index(path)
    if not index.ntotal == rows == about["rows"] or index.d != about["dimensions"]:
        raise BadInput(f"{path}: {index.ntotal} vectors, and {rows} ids in {names[0].name}; make it again with qembed index")
    columns = [name for name in schema.names if name != corpora.ID]
    texts = [name for name in columns if str(schema.field(name).type) in ("string", "large_string", "string_view")]
    return Store(path, index, about, metadata(schema, METADATA, names[0]), columns, texts)


def _described(ids: Path) -> tuple[Any, int]:
    """The schema and the number of rows of a file of ids."""
    try:
        with parquet.opened(ids) as file:
            return file.schema, file.rows
    except BadInput as error:
        raise BadInput(f"{error}; make the index again with qembed index") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _write_index(index: Any, partial: Path) -> None:
    try:
        ivf.library().write_index(index, str(partial))
    except RuntimeError as error:
        raise OSError(_system_message(str(error))) from error
    sync_path(partial)


def _write_ids(partial: Path, corpus: Corpus, about: Mapping[str, Any], on_stage: Callable[[str, int], None]) -> None:
    from pyarrow.parquet import ParquetWriter

    notes = {METADATA: json.dumps(corpus.about, ensure_ascii=False), ABOUT_INDEX: json.dumps(about, ensure_ascii=False)}
    writer, done = None, 0
    try:
        for table in corpora.others(corpus):
            writer = writer or ParquetWriter(
                partial, table.schema.with_metadata({key: note.encode() for key, note in notes.items()}), compression="zstd"
            )
            writer.write_table(table.cast(writer.schema))
            done += table.num_rows
            on_stage("writing the ids", done)
    finally:
        if writer is not None:
            writer.close()
    if done != corpus.rows:
        raise BadInput(f"{corpus.path}: {done:,} rows, its footer says {corpus.rows:,}: it was changed while it was read")
    sync_path(partial)


def _read_index(path: Path) -> Any:
    try:
        return ivf.library().read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise QembedError(f"{path}: FAISS cannot read it: {_words(error)}") from error


def _system_message(message: str) -> str:
    """The system's error message in FAISS's own: after its last colon, or in brackets at its end."""
    bracketed = re.search(r"\(([^()]+)\)\s*$", message)
    return (bracketed[1] if bracketed else message.rpartition(": ")[2].strip()) or "FAISS could not write it"


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
