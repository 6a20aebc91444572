"""A Parquet file that unpacks to more than is read costs a reject or one clear line, and no memory of this process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qembed.errors import BadInput
from qembed.parquet import file as parquet_file
from qembed.parquet import worker
from qembed.text.rows.reader import opened
from qembed.vectors import vector_files
from qembed.vllm import machine

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(arrow.table(columns), path, compression="zstd", **options)
    return path


def rows(path: Path, column: str = "text") -> list[tuple[Any, str | None]]:
    with opened(path) as records:
        return [(record.values.get(column), record.reason) for record in records.read({column: ""})]


def worker_of(file: Any) -> Any:
    return file._process._child


@pytest.fixture(autouse=True)
def new_worker() -> None:
    parquet_file.close()


def test_a_row_of_a_long_text_is_rejected_and_the_next_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["first", "z" * 2**27, "last"]})
    assert path.stat().st_size < 2**16
    values, reasons = zip(*rows(path), strict=True)
    assert values == ("first", None, "last")
    assert "larger than 64 MiB" in reasons[1]


@pytest.mark.parametrize("kind", ["list", "struct", "map"])
def test_a_row_of_millions_of_values_is_rejected(kind: str, tmp_path: Path) -> None:
    many = 2 * worker.MOST_VALUES
    values = {
        "list": arrow.array([[True], [True] * many], arrow.list_(arrow.bool_())),
        "struct": arrow.array([{"a": [1]}, {"a": [0] * many}], arrow.struct([("a", arrow.list_(arrow.int8()))])),
        "map": arrow.array([[(1, 1)], [(1, 1)] * many], arrow.map_(arrow.int8(), arrow.int8())),
    }[kind]
    path = write(tmp_path / "a.parquet", {"text": values})
    assert path.stat().st_size < 2**17
    first, second = rows(path)
    assert first[1] is None
    assert "more than 1,048,576 values" in str(second[1])


def test_many_rows_that_are_large_together_are_sent_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        parquet_file, "_batch", lambda content, read=parquet_file._batch: (sizes.append(len(content)), read(content))[1]
    )
    texts = [f"{n} {'y' * 2**20}" for n in range(200)]
    path = write(tmp_path / "a.parquet", {"text": texts}, write_statistics=False)
    assert [text for text, _ in rows(path)] == texts
    assert max(sizes) < 2 * worker.LARGEST_BATCH


def test_what_does_not_fit_into_the_memory_of_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_file, "MEMORY", 450 * 2**20)
    path = write(tmp_path / "a.parquet", {"text": ["z" * 2**28]})
    with pytest.raises(BadInput, match="takes more than 450 MiB of memory"):
        rows(path)
    assert rows(write(tmp_path / "b.parquet", {"text": ["a text"]})) == [("a text", None)]


def test_more_rows_than_a_file_of_this_size_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": arrow.nulls(20_000_000, arrow.int8())})
    assert path.stat().st_size < 2**16
    with pytest.raises(BadInput, match="20,000,000 rows in"):
        rows(path)


def test_a_worker_that_hangs_is_ended_and_the_next_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a text"]})
    monkeypatch.setattr(parquet_file, "PATIENCE", 0.01)
    with parquet_file.opened(path) as file:
        os.kill(worker_of(file).pid, signal.SIGSTOP)
        with pytest.raises(BadInput, match="takes more than 60 s"):
            list(file.batches(1, ["text"]))
    assert worker_of(file).poll() is not None
    monkeypatch.undo()
    assert rows(path) == [("a text", None)]


def test_a_worker_reads_file_after_file_and_two_at_once(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.parquet", {"text": [name]}) for name in "ab"]
    with parquet_file.opened(paths[0]) as first, parquet_file.opened(paths[1]) as second:
        assert worker_of(first).pid != worker_of(second).pid
        batches = [next(file.batches(1, ["text"])) for file in (first, second)]
    assert [batch.to_pylist() for batch in batches] == [[{"text": "a"}], [{"text": "b"}]]
    with parquet_file.opened(paths[0]) as again:
        assert worker_of(again).pid in (worker_of(first).pid, worker_of(second).pid)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    for path, reason in ((tmp_path / "a.parquet", "regular file"), (tmp_path / "b.parquet", "No such file")):
        with pytest.raises(BadInput, match=reason):
            rows(path)


def test_stored_vectors_of_millions_of_numbers(tmp_path: Path) -> None:
    many = arrow.array([[0.5] * 2 * worker.MOST_VALUES], arrow.list_(arrow.float32()))
    with pytest.raises(BadInput, match=r"row 1: larger .* values"):
        vector_files.read(write(tmp_path / "a.parquet", {"vector": many}))


def test_stored_vectors_that_do_not_fit_into_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"vector": arrow.array([[0.5] * 8] * 1000, arrow.list_(arrow.float32(), 8))})
    host = machine.host()
    monkeypatch.setattr(machine, "host", lambda: type("Host", (), {**vars(host), "free": 31_999})())
    with pytest.raises(BadInput, match="1,000 vectors take"):
        vector_files.read(path)
