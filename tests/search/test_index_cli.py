"""`qembed index`: its indexes, kept columns, measured recall, and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

from qembed.errors import BadInput
from qembed.search import build, corpus, recall, store
from qembed.search.nearest import nearest
from qembed.vectors import ivf
from tests.search.conftest import ABOUT, clustered, error_line, json_output, qembed, write


def truth(vectors: np.ndarray[Any, Any], queries: np.ndarray[Any, Any], depth: int) -> tuple[Any, Any]:
    """Rows and cosines of the nearest vectors, by numpy in float64."""
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-products, axis=1, kind="stable")[:, :depth]
    return order, np.take_along_axis(products, order, axis=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_flat_index_is_exact_and_keeps_order_ids_and_columns(tmp_path: Path, dtype: Any) -> None:
    vectors = clustered(700).astype(dtype)
    source = write(tmp_path / "v.parquet", vectors, {"text": [f"t {row}" for row in range(700)], "price": range(700)})
    summary = json_output("index", source, "-o", tmp_path / "i.faiss")
    assert (summary["rows"], summary["dimensions"], summary["kind"], summary["recall"]) == (700, 64, "flat", None)
    stored = store.read(tmp_path / "i.faiss")
    queries = clustered(20, seed=5)
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    order, cosines = truth(unit, queries, 10)
    scores, rows = nearest(stored.index, "flat", queries, 10, None)
    assert (rows == order).all()
    assert scores == pytest.approx(cosines, abs=1e-6)
    entries = stored.entries([699, 3, 3, 0], ["id", "price", "text"])
    assert entries == [{"id": f"doc{row}", "price": row, "text": f"t {row}"} for row in (699, 3, 3, 0)]
    assert faiss.read_index(str(tmp_path / "i.faiss")).ntotal == 700


def test_columns_of_other_tools_have_values_for_json(tmp_path: Path) -> None:
    text = arrow.Array.from_buffers(arrow.string(), 2, arrow.array([b"\xff", b"a"]).buffers())
    columns = {
        "raw": [b"\0\xff", None],
        "day": arrow.array([10**7, 0], arrow.int32()).cast(arrow.date32()),
        "text": text,
        "price": arrow.array([0.5, 2], arrow.float32()),
    }
    write(tmp_path / "v.parquet", clustered(2), columns)
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    assert store.read(tmp_path / "i.faiss").entries([0, 1], list(columns)) == [
        {"raw": "00ff", "day": "29349-01-26", "text": "\ufffd", "price": 0.5},
        {"raw": None, "day": "1970-01-01", "text": "a", "price": 2.0},
    ]


def test_vectors_of_any_length_are_compared_by_cosine(tmp_path: Path) -> None:
    vectors = clustered(50)
    rescaled = vectors * np.linspace(0.01, 90, 50, dtype=np.float32)[:, None]
    write(tmp_path / "v.parquet", rescaled)
    json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    scores, rows = nearest(store.read(tmp_path / "i.faiss").index, "flat", vectors[:5], 3, None)
    assert (rows == truth(vectors, vectors[:5], 3)[0]).all()
    assert scores[:, 0] == pytest.approx(1, abs=1e-6)


def test_int8_vectors_are_compared_by_cosine_and_binary_ones_by_their_signs(tmp_path: Path) -> None:
    vectors = clustered(400)
    integers = np.rint(vectors * 127 / np.abs(vectors).max(axis=1, keepdims=True)).astype(np.int8)
    write(tmp_path / "i.parquet", integers, about={**ABOUT, "dtype": "int8"})
    bits = np.packbits(vectors > 0, axis=1)
    write(tmp_path / "b.parquet", bits, about={**ABOUT, "dtype": "binary"}, dimensions=64)
    queries = clustered(9, seed=4)
    for name, exact in (("i", integers.astype(np.float64)), ("b", np.where(vectors > 0, 1.0, -1.0))):
        assert json_output("index", tmp_path / f"{name}.parquet", "-o", tmp_path / "x.faiss")["dimensions"] == 64
        scores, rows = nearest(store.read(tmp_path / "x.faiss").index, "flat", queries, 5, None)
        unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
        order, cosines = truth(unit, queries, 5)
        assert (rows == order).all()
        assert scores == pytest.approx(cosines, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "settings"),
    [
        ("ivf-flat", [], {"nlist": 76}),
        ("ivf-flat", ["--nlist", 30], {"nlist": 30}),
        ("hnsw", [], {"m": 32, "ef_construction": 200}),
        ("hnsw", ["--m", 8, "--ef-construction", 40], {"m": 8, "ef_construction": 40}),
    ],
)
def test_recall_of_approximate_indexes_is_measured_against_exact_search(
    tmp_path: Path, kind: build.Kind, options: list[Any], settings: dict[str, int]
) -> None:
    vectors = clustered(3000)
    write(tmp_path / "v.parquet", vectors)
    summary = json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss", "--kind", kind, *options)
    assert summary["settings"] == settings
    measured = summary["recall"]
    points = measured["points"]
    recalls = [point["recall"] for point in points]
    assert recalls[0] < recalls[-1]
    assert recalls[-1] >= recall.COMPLETE or kind == "hnsw"
    complete = [point["width"] for point in points if point["recall"] >= 0.95]
    assert summary["width"] == measured["chosen"] == complete[0]
    stored = store.read(tmp_path / "i.faiss")
    assert stored.index.ntotal == 3000
    faiss_index: Any = faiss.downcast_index(stored.index)
    assert (
        faiss_index.nlist == settings["nlist"]
        if kind == "ivf-flat"
        else faiss_index.hnsw.efConstruction == settings["ef_construction"]
    )

    drawn = ivf.draw(3000, recall.QUERIES)
    order, _ = truth(vectors, vectors[drawn], 11)
    true_nearest = [set(rows[rows != own_row][:10]) for rows, own_row in zip(order, drawn, strict=True)]
    for point in points:
        _, rows = nearest(stored.index, kind, vectors[drawn], 11, point["width"])
        returned = [set(rows_[rows_ != own_row][:10]) for rows_, own_row in zip(rows, drawn, strict=True)]
        by_hand = np.mean([len(a & b) / 10 for a, b in zip(true_nearest, returned, strict=True)])
        assert point["recall"] == pytest.approx(by_hand, abs=0.002)
    exact = nearest(stored.index, kind, vectors[:9], 10, None)[1]
    assert (exact == truth(vectors, vectors[:9], 10)[0]).all()


def test_equal_vectors_do_not_lower_the_recall(tmp_path: Path) -> None:
    vectors = np.repeat(clustered(60), 40, axis=0)
    write(tmp_path / "v.parquet", vectors)
    summary = json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss", "--kind", "ivf-flat")
    assert summary["recall"]["points"][-1]["recall"] == 1


def test_recall_is_measured_with_given_queries(tmp_path: Path) -> None:
    vectors, queries = clustered(2000), clustered(1100, seed=3)
    write(tmp_path / "v.parquet", vectors)
    write(tmp_path / "q.parquet", queries)
    arguments = ["index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss", "--force", "--kind", "ivf-flat", "--queries"]
    measured = json_output(*arguments, tmp_path / "q.parquet")["recall"]
    assert (measured["queries"], measured["source"]) == (1000, str(tmp_path / "q.parquet"))
    stored = store.read(tmp_path / "i.faiss")
    order, _ = truth(vectors, queries[:1000], 10)
    _, rows = nearest(stored.index, "ivf-flat", queries[:1000], 10, 4)
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(order, rows, strict=True)])
    assert next(point for point in measured["points"] if point["width"] == 4)["recall"] == pytest.approx(by_hand, abs=1e-3)
    write(tmp_path / "other.parquet", queries, about={**ABOUT, "model": "Qwen/Other"})
    assert "vectors of Qwen/Other" in error_line(*arguments, tmp_path / "other.parquet")
    write(tmp_path / "short.parquet", queries[:, :32])
    assert "32 dimensions" in error_line(*arguments, tmp_path / "short.parquet")


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("kind", build.KINDS)
def test_every_kind_of_index_works_with_few_vectors(tmp_path: Path, rows: int, kind: build.Kind) -> None:
    vectors = clustered(rows)
    write(tmp_path / "v.parquet", vectors)
    code, _, err = qembed(
        "index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss", "--kind", kind, "--report", tmp_path / "r.html"
    )
    assert code == 0, err
    stored = store.read(tmp_path / "i.faiss")
    _, nearest_rows = nearest(stored.index, kind, vectors, 1, None)
    assert (nearest_rows[:, 0] == np.arange(rows)).all()


def test_parts_of_a_folder_are_one_corpus_and_ids_without_a_column_are_numbers(tmp_path: Path) -> None:
    vectors = clustered(90)
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(3):
        rows = slice(30 * part, 30 * part + 30)
        write(folder / f"part-{part}.parquet", vectors[rows], {"id": [f"d{row}" for row in range(90)[rows]]})
    summary = json_output("index", folder, "-o", folder / "i.faiss")
    assert summary["rows"] == 90
    stored = store.read(folder / "i.faiss")
    assert [entry["id"] for entry in stored.entries([0, 31, 89], ["id"])] == ["d0", "d31", "d89"]
    assert json_output("index", folder, "-o", folder / "i.faiss")["rows"] == 90, "its own ids are no part"

    lists = arrow.table({"embedding": arrow.array(vectors.tolist(), arrow.list_(arrow.float64()))})
    parquet.write_table(lists, tmp_path / "plain.parquet", row_group_size=7)
    assert json_output("index", tmp_path / "plain.parquet", "-o", tmp_path / "p.faiss")["model"] is None
    stored = store.read(tmp_path / "p.faiss")
    assert [entry["id"] for entry in stored.entries([0, 88], ["id"])] == ["1", "89"]
    assert nearest(stored.index, "flat", vectors[40:41], 1, None)[1].item() == 40

    write(folder / "part-3.parquet", vectors[:, :32], {"id": range(90)})
    assert "not a part of the same run" in error_line("index", folder, "-o", tmp_path / "n.faiss")


def write_with_bad_row(path: Path, **changes: Any) -> Path:
    """Write a file whose row 7 is changed."""
    vectors = clustered(20)
    for value in changes.values():
        vectors[6] = value
    return write(path, vectors)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_zero_and_non_finite_vectors_are_refused_by_row(tmp_path: Path, value: float) -> None:
    source = write_with_bad_row(tmp_path / "v.parquet", row=value)
    assert "row 7: the vector is zero or not finite" in error_line("index", source, "-o", tmp_path / "i.faiss")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.parquet"]


def test_files_without_vectors_are_one_line(tmp_path: Path) -> None:
    def refusal(table: Any, name: str = "x.parquet") -> str:
        if table is not None:
            parquet.write_table(arrow.table(table), tmp_path / name)
        return error_line("index", tmp_path / name, "-o", tmp_path / "i.faiss")

    floats = arrow.array(clustered(4).tolist(), arrow.list_(arrow.float32()))
    assert "no column vector or embedding; it has id, text" in refusal({"id": ["a"], "text": ["b"]})
    assert "not lists of numbers" in refusal({"vector": [1.0, 2.0]})
    assert "lists of int32, not vectors" in refusal({"vector": arrow.array([[1, 2]], arrow.list_(arrow.int32()))})
    assert "lists of uint8, not vectors" in refusal({"vector": arrow.array([[1, 2]], arrow.list_(arrow.uint8()))})
    assert "row 2: 3 numbers, not 2" in refusal({"vector": [[1.0, 2.0], [1.0, 2.0, 3.0]]})
    assert "row 2: 0 numbers" in refusal({"vector": [[1.0, 2.0], None]})
    assert "row 2: a number of the vector is missing" in refusal({"vector": [[1.0, 2.0], [1.0, None]]})
    assert "row 3: 0 numbers" in refusal(
        {"vector": arrow.array([[1.0, 2.0], [3.0, 1.0], None], arrow.list_(arrow.float32(), 2))}
    )
    assert "holds no vectors" in refusal({"vector": arrow.array([], arrow.list_(arrow.float32(), 8))})
    assert "No such file" in refusal(None, "none.parquet")
    assert "vectors are read from .parquet" in refusal(None, "none.npy")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1" + b"junk" * 40)
    assert "not a Parquet file, or damaged" in refusal(None, "junk.parquet")
    parquet.write_table(arrow.table({"id": ["a"] * 4, "vector": floats}), tmp_path / "cut.parquet")
    content = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    assert "damaged" in refusal(None, "cut.parquet")
    write(tmp_path / "note.parquet", clustered(4), about=None)
    table = parquet.read_table(tmp_path / "note.parquet").replace_schema_metadata({"qembed": "{"})
    parquet.write_table(table, tmp_path / "note.parquet")
    assert "its metadata 'qembed' is not JSON" in refusal(None, "note.parquet")


def test_contradicting_options_are_refused_before_reading(tmp_path: Path) -> None:
    source = write(tmp_path / "v.parquet", clustered(20))
    output = tmp_path / "i.faiss"
    assert "a setting of --kind ivf-flat" in error_line("index", source, "-o", output, "--nlist", 4)
    assert "a setting of --kind hnsw" in error_line("index", source, "-o", output, "--kind", "ivf-flat", "--m", 4)
    assert "only 20 vectors" in error_line("index", source, "-o", output, "--kind", "ivf-flat", "--nlist", 21)
    assert "there is no folder" in error_line("index", source, "-o", tmp_path / "no" / "i.faiss")
    assert ": a folder" in error_line("index", source, "-o", tmp_path)
    assert "name it v.faiss" in error_line("index", source, "-o", tmp_path / "v.npy")
    assert "name it .html or .json" in error_line("index", source, "-o", output, "--report", "r.md")
    assert not output.exists()


def test_an_index_that_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qembed.vllm import machine
    from qembed.vllm.devices import Target

    source = write(tmp_path / "v.parquet", clustered(20))
    monkeypatch.setattr(machine, "host", lambda: Target("cpu", "CPU", 10**9, 10**8))
    line = error_line("index", source, "-o", tmp_path / "i.faiss", code=1)
    assert "20 vectors of 64 dimensions need 0.2 GB as an index, 0.1 GB are free" in line
    monkeypatch.undo()
    json_output("index", source, "-o", tmp_path / "i.faiss")
    monkeypatch.setattr(machine, "host", lambda: Target("cpu", "CPU", 10**9, 1000))
    assert "0.0 GB must fit into memory" in error_line("search", "a", "--index", tmp_path / "i.faiss", code=1)


def test_a_failed_write_leaves_the_old_index(tmp_path: Path) -> None:
    first = write(tmp_path / "v.parquet", clustered(30))
    second = write(tmp_path / "w.parquet", clustered(3000, seed=2))
    output = tmp_path / "i.faiss"
    json_output("index", first, "-o", output)
    before = {path.name: path.read_bytes() for path in (output, store.ids_path(output))}
    # A limit on the file size makes the write fail like a full disk.
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({300_000}, {300_000}))\n"
        "from qembed.cli import main\n"
        f"sys.argv = ['qembed', 'index', {str(second)!r}, '-o', {str(output)!r}, '--force']\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert f"qembed: {output}: cannot be written: File too large\n" in result.stderr
    assert {path.name: path.read_bytes() for path in (output, store.ids_path(output))} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.faiss", "i.faiss.ids.parquet", "v.parquet", "w.parquet"]


def test_a_run_interrupted_between_the_renames_is_completed_by_the_next_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "i.faiss"
    json_output("index", write(tmp_path / "v.parquet", clustered(30)), "-o", output)
    second = write(tmp_path / "w.parquet", clustered(50, seed=2))
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith(".ids.parquet"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    assert qembed("index", second, "-o", output, "--force")[0] == 130
    monkeypatch.setattr(os, "replace", real)
    stored = store.read(output)
    assert stored.rows == 50
    assert stored.entries([49], ["text"]) == [{"text": "text 49"}]
    assert not list(tmp_path.glob(".*"))


def test_damaged_and_mismatched_files_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "v.parquet", clustered(300))
    output = tmp_path / "i.faiss"
    json_output("index", source, "-o", output)
    content, ids = output.read_bytes(), store.ids_path(output).read_bytes()

    def refusal() -> str:
        with pytest.raises(BadInput) as error:
            store.read(output)
        assert "\n" not in str(error.value)
        return str(error.value)

    for broken in (content[:-100], content[:5000] + b"\x00\x01" + content[5002:], b"", b"IxFI" + b"\xff" * 60):
        output.write_bytes(broken)
        assert "damaged, or not the index that i.faiss.ids.parquet belongs to" in refusal()
    output.write_bytes(content)
    store.ids_path(output).write_bytes(ids[: len(ids) // 2])
    assert "i.faiss.ids.parquet: not a Parquet file, or damaged" in refusal()
    store.ids_path(output).write_bytes(source.read_bytes())
    assert "damaged, or not the index that" in refusal()
    store.ids_path(output).unlink()
    assert "i.faiss.ids.parquet is missing: it holds the ids" in refusal()
    output.unlink()
    assert "no such file; make an index with: qembed index" in refusal()


@pytest.mark.slow
def test_memory_grows_only_with_the_index(tmp_path: Path) -> None:
    peaks = []
    for rows in (20_000, 60_000):  # one row group each, which is still read in pieces
        source = write(tmp_path / f"{rows}.parquet", np.tile(clustered(500, 512), (rows // 500, 1)), row_group_size=rows)
        code = (
            "import sys\n"
            "from qembed.cli import group\n"
            f"arguments = ['index', {str(source)!r}, '-o', {str(tmp_path / 'i.faiss')!r}, '--force', '--json']\n"
            "group.main(arguments, standalone_mode=False)\n"
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1], file=sys.stderr)\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(result.stderr.split()[-1]) * 1024)
    grown, index = peaks[1] - peaks[0], 40_000 * 512 * 4
    assert grown < 1.4 * index, f"{grown / index:.2f} of the index's own size"


def test_a_file_that_changes_during_reading_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "v.parquet", clustered(20))
    monkeypatch.setattr(corpus, "vectors", lambda _: iter([clustered(10)]))
    assert "it was changed while it was read" in error_line("index", source, "-o", tmp_path / "i.faiss")


def test_an_index_is_replaced_only_with_force_and_never_its_input(tmp_path: Path) -> None:
    source = write(tmp_path / "v.parquet", clustered(20))
    output = tmp_path / "i.faiss"
    json_output("index", source, "-o", output)
    before = output.read_bytes(), store.ids_path(output).read_bytes()
    assert "--force to replace it" in error_line("index", source, "-o", output)
    output.unlink()
    assert "--force to replace it" in error_line("index", source, "-o", output)
    output.write_bytes(before[0])
    link = tmp_path / "link.faiss"
    link.symlink_to(source)
    assert "is the input" in error_line("index", source, "-o", link, "--force")
    own_ids = store.ids_path(tmp_path / "j.faiss")
    source.rename(own_ids)
    assert "is the input" in error_line("index", own_ids, "-o", tmp_path / "j.faiss", "--force")
    folder = tmp_path / "parts"
    folder.mkdir()
    own_ids.rename(folder / "v.parquet")
    link.unlink()
    link.symlink_to(folder / "v.parquet")
    assert "is the input" in error_line("index", folder, "-o", link, "--force")
    assert (output.read_bytes(), store.ids_path(output).read_bytes()) == before
