"""Every output format holds the same vectors in input order, with ids and the chosen columns."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from .conftest import Embed, expected

ROOT = Path(__file__).parents[2]
TEXTS = [
    "an audio player",
    "a",
    "a much longer text than the others, " * 3,
    "Ünïcödé 漢字",
    'quotes " and\nline breaks, commas',
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"id": f"row-{n}", "text": text, "price": n / 2, "tags": ["x", n], "ok": n > 1} for n, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Ids and vectors, read as a user of that format would."""
    beside = path.with_name(path.stem + ".ids.jsonl")
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        assert isinstance(array, np.memmap)
        return [json.loads(line)["id"] for line in beside.read_text(encoding="utf-8").splitlines()], array
    if path.suffix == ".fvecs":
        raw = np.fromfile(path, "<i4")
        rows = raw.reshape(-1, raw[0] + 1)
        assert (rows[:, 0] == raw[0]).all()
        return [json.loads(line)["id"] for line in beside.read_text(encoding="utf-8").splitlines()], rows[:, 1:].view("<f4")
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        table.validate(full=True)
        width = table.schema.field("vector").type.list_size
        values = table["vector"].combine_chunks().flatten().to_numpy()
        return table["id"].to_pylist(), values.reshape(-1, width)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [row["id"] for row in rows], np.array([row["vector"] for row in rows])
    with path.open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    return [row["id"] for row in cells], np.array([json.loads(row["vector"]) for row in cells])


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".csv", ".jsonl", ".fvecs"])
def test_each_format_holds_the_vectors_in_the_order_of_the_input(embed: Embed, source: Path, suffix: str) -> None:
    out = source.with_name("out" + suffix)
    result = embed(source, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["vectors"] == len(TEXTS)
    ids, vectors = read(out)
    assert ids == [f"row-{n}" for n in range(len(TEXTS))]
    # Text formats hold enough digits to restore each number exactly.
    np.testing.assert_array_equal(vectors.astype(np.float32), np.stack([expected(text) for text in TEXTS]))
    assert not list(source.parent.glob(".*"))
    assert not source.with_name("out.rejects.jsonl").exists()


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_smaller_dtypes(embed: Embed, source: Path, suffix: str, dtype: str) -> None:
    out = source.with_name("out" + suffix)
    assert embed(source, "-o", out, "--output-dtype", dtype).exit_code == 0
    _, vectors = read(out)
    whole = np.stack([expected(text) for text in TEXTS])
    if dtype == "binary":
        np.testing.assert_array_equal(np.unpackbits(vectors.astype(np.uint8), axis=1), whole > 0)
    else:
        cosine = (vectors.astype(np.float64) * whole).sum(axis=1) / np.linalg.norm(vectors.astype(np.float64), axis=1)
        assert (cosine > 0.9999).all()
    if dtype == "int8":
        assert (np.abs(vectors.astype(int)).max(axis=1) == 127).all()
    if suffix in (".npy", ".parquet"):
        assert vectors.dtype == np.dtype("uint8" if dtype == "binary" else dtype)


def test_columns_are_kept_with_their_types_and_parquet_describes_its_content(embed: Embed, source: Path) -> None:
    out = source.with_name("out.parquet")
    keep = ["--keep", "price", "--keep", "tags", "--keep", "ok", "--keep", "text"]
    assert embed(source, "-o", out, *keep, "--prompt", "query", "--dimensions", "32").exit_code == 0
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["id", "vector", "price", "tags", "ok", "text"]
    assert str(table.schema.field("vector").type).startswith("fixed_size_list<")
    assert table["price"].to_pylist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert table["ok"].to_pylist() == [False, False, True, True, True]
    assert json.loads(table["tags"].to_pylist()[3]) == ["x", 3]
    assert table["text"].to_pylist() == TEXTS
    about = json.loads(table.schema.metadata[b"qembed"])
    assert {name: about[name] for name in ("model", "dimensions", "dtype", "prompt")} == {
        "model": "sample", "dimensions": 32, "dtype": "float32", "prompt": "query",
    }  # fmt: skip


def test_columns_are_kept_in_the_other_formats(embed: Embed, source: Path) -> None:
    for suffix in (".npy", ".csv", ".jsonl"):
        assert embed(source, "-o", source.with_name("out" + suffix), "--keep", "price", "--keep", "tags").exit_code == 0
    beside = [json.loads(line) for line in source.with_name("out.ids.jsonl").read_text().splitlines()]
    assert beside[1] == {"id": "row-1", "price": 0.5, "tags": ["x", 1]}
    lines = [json.loads(line) for line in source.with_name("out.jsonl").read_text().splitlines()]
    assert lines[1] == {"id": "row-1", "vector": lines[1]["vector"], "price": 0.5, "tags": ["x", 1]}
    with source.with_name("out.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[1]["tags"] == '["x", 1]'


def test_a_value_that_does_not_fit_its_column_rejects_the_row_only(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qembed.embed import windows

    monkeypatch.setattr(windows, "ROWS", 4)
    rows = [{"text": f"text {n}", "price": "free" if n == 6 else n} for n in range(10)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = embed(tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet", "--keep", "price")
    assert result.exit_code == 4
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet")["price"].to_pylist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    (rejected,) = (tmp_path / "out.rejects.jsonl").read_text().splitlines()
    assert json.loads(rejected)["reason"] == 'price is "free", where earlier rows have int64'


def test_many_windows_are_one_file_in_each_format(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qembed.embed import windows

    monkeypatch.setattr(windows, "ROWS", 7)
    texts = [f"{'long ' * (n % 9)}text {n}" for n in range(50)]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    for suffix in (".npy", ".parquet", ".csv", ".jsonl", ".fvecs"):
        out = tmp_path / f"out{suffix}"
        assert embed(tmp_path / "in.txt", "-o", out, "--force").exit_code == 0
        ids, vectors = read(out)
        assert ids == [str(n) for n in range(1, 51)]
        np.testing.assert_array_equal(vectors.astype(np.float32), np.stack([expected(text) for text in texts]))
    assert pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").metadata.num_row_groups == 8


def test_no_vector_at_all_is_an_empty_file_of_the_right_shape(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n \n")
    for suffix in (".npy", ".parquet", ".csv", ".jsonl", ".fvecs"):
        out = tmp_path / f"out{suffix}"
        assert embed(tmp_path / "in.txt", "-o", out, "--force").exit_code == 4
    assert np.load(tmp_path / "out.npy").shape == (0, 16)
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == 0
    assert (tmp_path / "out.csv").read_text() == "id,vector\n"
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "out.fvecs").read_text() == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "out.bin"], ["out.bin", "unknown suffix", ".npy"]),
        (["-o", "out.fvecs", "--output-dtype", "int8"], [".fvecs holds float32"]),
        (["-o", "nowhere/out.npy"], ["no folder nowhere"]),
        (["-o", "out.npy", "--output-dtype", "binary", "--dimensions", "20"], ["whole bytes"]),
        (["-o", "out.npy", "--keep", "vector"], ["--keep vector"]),
        (["-o", "out.npy", "--keep", "nothing"], ["no column 'nothing'"]),
        (["-o", "out.npy", "--prompt", "query", "--instruction", "x"], ["leave one out"]),
        (["-o", "out.npy", "--prompt", "nonsense"], ["--prompt nonsense", "document, query"]),
        (["-o", "out.npy", "--overlap", "8"], ["--overlap goes with"]),
        (["-o", "out.npy", "--chunk-tokens", "65"], ["--chunk-tokens 65", "64 tokens"]),
        (["-o", "out.npy", "--chunk-tokens", "32", "--overlap", "17"], ["more than half"]),
        (["-o", "out.npy", "--url", "http://x", "--max-num-seqs", "3"], ["--max-num-seqs"]),
    ],
)
def test_invalid_options_are_reported_in_one_line_and_leave_no_files(
    embed: Embed, source: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(source.parent)
    before = sorted(source.parent.iterdir())
    result = embed(source.name, *options)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("qembed: ")]
    for word in words:
        assert word in line
    assert sorted(source.parent.iterdir()) == before


def test_the_recipe_for_rescoring_finds_the_nearest(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code block of docs/embed.md, unchanged."""
    texts = [f"{'word ' * (n % 13)}text {n}" for n in range(400)]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    (tmp_path / "queries.txt").write_text(texts[250])
    monkeypatch.chdir(tmp_path)
    for source, out, dtype in (("in", "binary", "binary"), ("in", "int8", "int8"), ("queries", "queries", "float32")):
        assert embed(f"{source}.txt", "-o", f"{out}.npy", "--dimensions", "256", "--output-dtype", dtype).exit_code == 0
    blocks = (ROOT / "docs" / "embed.md").read_text(encoding="utf-8").split("```python\n")[1:]
    (recipe,) = [block.split("```")[0] for block in blocks if "bitwise_count" in block]
    binary, int8 = recipe.split("\n# int8")
    exact = np.argsort(-np.stack([expected(text, 256) for text in texts]) @ expected(texts[250], 256))[:10]
    namespace: dict[str, Any] = {}
    for part in (binary, "# int8" + int8):
        exec(part, namespace)
        assert namespace["best"][0] == 250
        assert len({*map(int, namespace["best"])} & {*map(int, exact)}) >= 5


def test_existing_files_are_replaced_only_with_force(embed: Embed, source: Path) -> None:
    for name in ("out.npy", "out.ids.jsonl", "out.rejects.jsonl"):
        source.with_name(name).write_text("mine")
        result = embed(source, "-o", source.with_name("out.npy"))
        assert result.exit_code == 2
        assert name in result.stderr
        assert "exists already" in result.stderr
        assert source.with_name(name).read_text() == "mine"
        source.with_name(name).unlink()
    source.with_name("out.npy").write_text("old")
    assert embed(source, "-o", source.with_name("out.npy"), "--force").exit_code == 0
    assert np.load(source.with_name("out.npy")).shape == (len(TEXTS), 16)
