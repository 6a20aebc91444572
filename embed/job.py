"""The description of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qembed.embed import formats
from qembed.embed.engine import Engine
from qembed.embed.inputs import Inputs
from qembed.embed.outputs import CHUNK_COLUMNS, IDS, REJECTS, VECTORS
from qembed.embed.windows import CHARACTERS, TOKENS, Texts
from qembed.targets import Target
from qembed.text.rows.options import RowOptions

OpenEngine = Callable[[], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        inputs: files to read.
        output: file to write; its suffix selects the format.
        texts: how rows become texts.
        engine: opens the engine.
        text_column, id_column: columns of text and id; None for the defaults.
        keep: columns to copy to the output.
        rows: delimiter, encoding and header of the input.
        dtype: of the stored vectors, one of `vectors.dtypes.DTYPES`.
        about: metadata of the vectors, for formats that can store it.
        identity: everything that the result depends on, except the rows.
        rejects: file for rows without a vector.
        strict: whether a row that cannot be embedded ends the run.
        force: whether existing files are replaced.
        replaced: input files that the job would replace; it is refused unless they are its own finished output.
        others: what the job reads beside its inputs: the checkpoint's files, the file of keys.
    """

    inputs: Inputs
    output: Path
    texts: Texts
    engine: OpenEngine
    text_column: str | None = None
    id_column: str | None = None
    keep: Sequence[str] = ()
    rows: RowOptions = field(default_factory=RowOptions)
    dtype: str = "float32"
    about: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    rejects: Path | None = None
    strict: bool = False
    force: bool = False
    replaced: Sequence[Path] = ()
    others: Sequence[Path] = ()

    @property
    def partial(self) -> Path:
        """The folder of unfinished work."""
        return self.output.parent / f".{self.output.name}.partial"

    @property
    def columns(self) -> list[str]:
        """The columns beside id and vector."""
        return [*(CHUNK_COLUMNS if self.texts.chunk_tokens else ()), *self.keep]

    @property
    def targets(self) -> dict[str, Path]:
        """The final path of each file; the output comes last, because it signals that all files are there."""
        stem = self.output.with_suffix("")
        sides = {IDS: stem.with_name(stem.name + ".ids.jsonl")} if IDS in formats.kind(self.output, self.dtype).files else {}
        rejects = self.rejects or stem.with_name(stem.name + ".rejects.jsonl")
        return {**sides, REJECTS: rejects, VECTORS: self.output}

    def target(self, name: str) -> Target:
        """The file `name` of `targets`, with the option that decides its path."""
        return Target(self.targets[name], "--rejects" if name == REJECTS and self.rejects is not None else "--output")


def settings_of(job: Job) -> dict[str, Any]:
    """Everything that the result depends on, except the rows."""
    return {
        **job.identity,
        "format": job.output.suffix.lower(),
        "output dtype": job.dtype,
        "columns": job.columns,
        "text column": job.text_column,
        "id column": job.id_column,
        "delimiter": job.rows.delimiter,
        "encoding": job.rows.encoding,
        "header": job.rows.header,
        "prompt": job.texts.prompt,
        "cleaned": job.texts.cleaned,
        "truncate": job.texts.truncate,
        "limit": job.texts.limit,
        "chunk tokens": job.texts.chunk_tokens,
        "overlap": job.texts.overlap,
        "window": [job.texts.rows, TOKENS, CHARACTERS],
    }
