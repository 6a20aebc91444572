"""Vector files like those of `qembed embed`, helpers that run commands, and the fake servers of other tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from numpy.typing import NDArray
from pyarrow import parquet

from qembed.cli import group
from tests.eval.conftest import SERVED, start_server
from tests.test_rerank import start_vllm

__all__ = ["start_server", "start_vllm"]

ABOUT = {"model": SERVED, "dimensions": 64, "dtype": "float32", "prompt": "document", "version": "0.1.0"}


def clustered(rows: int, dimensions: int = 64, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors in clusters, like those of texts."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(2, rows // 40), dimensions))
    vectors = centres[random.integers(0, len(centres), rows)] + 0.6 * random.normal(size=(rows, dimensions))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def write(
    path: Path,
    vectors: NDArray[Any],
    columns: dict[str, Any] | None = None,
    about: dict[str, Any] | None = ABOUT,
    dimensions: int | None = None,
    **writing: Any,
) -> Path:
    """Write `vectors` [n, d] to Parquet, with ids doc0, doc1, … unless in `columns`. `about` None: no metadata of qembed."""
    flat = arrow.array(np.ascontiguousarray(vectors).ravel())
    lists = arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    columns = {"text": [f"text {row}" for row in range(len(vectors))]} if columns is None else dict(columns)
    ids = columns.pop("id", [f"doc{row}" for row in range(len(vectors))])
    table = arrow.table({"id": ids, "vector": lists, **columns})
    if about is not None:
        table = table.replace_schema_metadata({"qembed": json.dumps({**about, "dimensions": dimensions or vectors.shape[1]})})
    parquet.write_table(table, path, **writing)
    return path


def qembed(*arguments: object) -> tuple[int, str, str]:
    """Run a command; returns its exit code, standard output and standard error."""
    from click.testing import CliRunner

    result = CliRunner().invoke(group, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def json_output(*arguments: object) -> Any:
    """Run a command with --json, which must succeed; returns the JSON. `index` replaces an existing output."""
    overwrite = ["--force"] if arguments[0] == "index" else []
    code, out, err = qembed(*arguments, *overwrite, "--json")
    assert code == 0, err
    return json.loads(out)


def error_line(*arguments: object, code: int = 2) -> str:
    """Run a command that must fail with `code`; returns its error line."""
    exit_code, out, err = qembed(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("qembed: ")]
    assert (exit_code, len(lines), out) == (code, 1, ""), (exit_code, out, err)
    return lines[0]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    faiss.omp_set_num_threads(1)
    monkeypatch.setenv("COLUMNS", "200")
