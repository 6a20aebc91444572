"""Stored vectors as a side of `qembed eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from click.testing import CliRunner, Result
from pyarrow import parquet

from qembed.cli import group
from qembed.errors import BadInput
from qembed.text.texts import Text
from qembed.vectors import dtypes, matching, vector_files

RANDOM = np.random.default_rng(3)
VECTORS = RANDOM.normal(size=(5, 8)).astype(np.float32)
TEXTS = [Text(f"t{row}", f"text {row}") for row in range(5)]


def qembed(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["eval", *map(str, arguments)])


def npy(path: Path, vectors: np.ndarray) -> Path:
    np.save(path, vectors)
    return path


def table(path: Path, **columns: Any) -> Path:
    parquet.write_table(arrow.table(columns), path)
    return path


def in_order(file: matching.VectorFile, texts: list[Text]) -> np.ndarray:
    """The vectors of `texts`, all of which must be in the file."""
    matches = matching.match(texts, {"it": file})
    assert matches.texts == texts
    return np.asarray(matches.vectors["it"])


def test_two_arrays_need_no_texts_and_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left, right = VECTORS, VECTORS + 0.1 * RANDOM.normal(size=VECTORS.shape).astype(np.float32)
    result = qembed("--vectors", npy(tmp_path / "a.npy", left), "--baseline-vectors", npy(tmp_path / "b.npy", right), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    expected = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(left, right, strict=True)]
    assert report["results"]["overall"]["mean"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert report["candidate"]["engine"] == "file"
    assert report["candidate"]["model"] == "a.npy"
    assert report["results"]["worst"][0]["id"] == f"row {int(np.argmin(expected)) + 1}"
    assert (
        "a.npy, stored vectors, stored in float32"
        in qembed("--vectors", tmp_path / "a.npy", "--baseline-vectors", tmp_path / "b.npy").stdout
    )


def test_a_file_against_a_checkpoint(fp16: Path, tmp_path: Path) -> None:
    from qembed.checkpoint.find import find
    from qembed.vectors import reference

    data = tmp_path / "texts.txt"
    data.write_text("one\ntwo\nthree\n")
    vectors = reference.embed(reference.load(find(str(fp16))), ["one", "two", "three"])
    result = qembed("--vectors", npy(tmp_path / "v.npy", vectors), "--baseline-model", fp16, "--data", data, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["results"]["overall"]["minimum"] == pytest.approx(1, abs=1e-5)


def test_parquet_is_matched_by_id_or_text_or_order(tmp_path: Path) -> None:
    order = [3, 1, 4, 0, 2]
    rows = [VECTORS[row].tolist() for row in order]
    by_id = vector_files.read(table(tmp_path / "i.parquet", id=[f"t{row}" for row in order], embedding=rows))
    assert np.allclose(in_order(by_id, TEXTS), VECTORS)
    by_text = vector_files.read(table(tmp_path / "t.parquet", text=[f"text {row}" for row in order], vector=rows))
    assert np.allclose(in_order(by_text, TEXTS[1:3]), VECTORS[1:3])
    by_order = vector_files.read(table(tmp_path / "o.parquet", vector=rows))
    assert np.allclose(in_order(by_order, TEXTS), VECTORS[order])
    with pytest.raises(BadInput, match="no vector for any of 1 texts, by id: it has 't3', 't1', 't4', …, the texts have 'new'"):
        in_order(by_id, [Text("new", "x")])


def test_files_that_hold_no_vectors_are_named(tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(BadInput, match=words) as caught:
            vector_files.read(path)
        assert str(path) in str(caught.value)

    refused(tmp_path / "none.npy", "cannot be read: No such file")
    refused(tmp_path / "none.parquet", "cannot be read")
    refused(npy(tmp_path / "one.npy", np.zeros(3)), r"an array \[texts, dimensions\] of floats or int8 is needed")
    refused(npy(tmp_path / "int.npy", np.zeros((3, 2), int)), "this is int64")
    refused(npy(tmp_path / "bits.npy", np.zeros((3, 2), np.uint8)), r"uint8.*embed into \.parquet")
    refused(npy(tmp_path / "object.npy", np.array([[1.0, "a"]], object)), "not a .npy array")
    (tmp_path / "text.npy").write_text("no array")
    refused(tmp_path / "text.npy", "not a .npy array")
    (tmp_path / "empty.npy").write_text("")
    refused(tmp_path / "empty.npy", "not a .npy array")
    (tmp_path / "text.parquet").write_text("no table")
    refused(tmp_path / "text.parquet", "not a Parquet file")
    refused(table(tmp_path / "c.parquet", other=[1]), "no column vector or embedding; it has other")
    refused(table(tmp_path / "d.parquet", vector=[[1.0, 2.0], [1.0]]), "row 2: 1 number, not 2")
    refused(table(tmp_path / "n.parquet", vector=[[1.0, 2.0], None]), "row 2: 0 numbers, not 2")
    refused(table(tmp_path / "h.parquet", vector=[[1.0, 2.0], [1.0, None]]), "row 2: a number of the vector is missing")
    refused(table(tmp_path / "s.parquet", vector=[["a", "b"]]), "lists of string")
    refused(table(tmp_path / "l.parquet", vector=[[1, 2]]), "lists of int64")
    refused(table(tmp_path / "f.parquet", vector=[1.0, 2.0]), "holds double, not lists")
    refused(table(tmp_path / "e.parquet", vector=arrow.array([], arrow.list_(arrow.float32()))), "holds no vectors")
    for name, content, words in (
        ("a.fvecs", b"", "holds no vectors"),
        ("b.fvecs", b"12345", "not .fvecs: its size"),
        ("c.fvecs", np.array([2, 0, 0, 3, 0, 0], "<i4").tobytes(), "begins with the same length"),
        ("d.fvecs", np.array([2, 0, 0, 2, 0], "<i4").tobytes(), "not whole"),
        ("e.fvecs", np.array([-1, 0], "<i4").tobytes(), "not .fvecs"),
        ("a.jsonl", b"", "holds no vectors"),
        ("b.jsonl", b'{"id": 1, "x": [1.5]}', "no vector or embedding; it has id, x"),
        ("c.jsonl", b'{"id": 1, "vector": [1.5, 2]}\n{"id": 2, "vector": [1.5]}', "line 2: 1 number, not 2"),
        ("d.jsonl", b'{"id": 1, "vector": [1.5]}\n{"vector": [1.5]}', "line 2: no id"),
        ("e.jsonl", b'{"id": 1, "vector": ["1.5"]}', "not a list of numbers"),
        ("f.jsonl", b'{"id": 1, "vector": [1%s]}' % (b"0" * 400), "not a list of numbers"),
        ("g.jsonl", b'{"id": 1, "vector": [1.5]}\n{"id": 1, "vector": [0.5]}', "1 id in more than one row"),
        ("h.jsonl", b'{"id": 1, "vector": [0, 255, 7]}', r"packed bits; embed into \.parquet"),
        ("a.csv", b'id,vector\n1,"[0.5,]"\n', "not a list of numbers"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, words)
    refused(tmp_path / "v.xlsx", r"vectors are read from \.parquet")


def write_stored(path: Path, vectors: np.ndarray, dtype: str, metadata: dict[str, Any] | None = None) -> Path:
    """Write a file as `qembed embed --output-dtype` does, with `metadata` changed."""
    stored = dtypes.encode(vectors, dtype)
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(stored.reshape(-1)), stored.shape[1])
    note = {"dtype": dtype, "dimensions": vectors.shape[1], **(metadata or {})}
    rows = arrow.table({"id": [text.id for text in TEXTS[: len(vectors)]], "vector": lists})
    parquet.write_table(rows.replace_schema_metadata({"qembed": json.dumps(note)}), path)
    return path


@pytest.mark.parametrize("dtype", dtypes.DTYPES)
def test_each_stored_dtype_is_read_according_to_its_metadata(dtype: str, tmp_path: Path) -> None:
    file = vector_files.read(write_stored(tmp_path / "v.parquet", VECTORS, dtype))
    assert file.dtype == dtype
    assert file.vectors.shape == VECTORS.shape
    if dtype == "binary":
        assert np.array_equal(in_order(file, TEXTS), np.where(VECTORS > 0, 1, -1))
    else:
        lengths = np.linalg.norm(file.vectors, axis=1) * np.linalg.norm(VECTORS, axis=1)
        assert (file.vectors * VECTORS).sum(axis=1) / lengths == pytest.approx(1, abs=1e-3)


def test_bits_of_unrelated_vectors_are_not_similar(tmp_path: Path) -> None:
    left, right = RANDOM.normal(size=(2, 5, 1024)).astype(np.float32)
    paths = write_stored(tmp_path / "a.parquet", left, "binary"), write_stored(tmp_path / "b.parquet", right, "float32")
    result = qembed("--vectors", paths[0], "--baseline-vectors", paths[1], "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert abs(report["results"]["overall"]["mean"]) < 0.1
    assert report["results"]["dimension"] == 1024
    assert report["candidate"]["dtype"] == "binary"


def test_the_ids_of_an_array_must_match_its_rows(tmp_path: Path) -> None:
    path = npy(tmp_path / "v.npy", VECTORS)
    (tmp_path / "v.ids.jsonl").write_text("".join(f'{{"id": "t{row}"}}\n' for row in (4, 3, 2, 1, 0)))
    assert np.array_equal(in_order(vector_files.read(path), TEXTS), VECTORS[::-1])
    (tmp_path / "v.ids.jsonl").write_text('{"id": "t0"}\n')
    with pytest.raises(BadInput, match=r"v\.ids\.jsonl: 1 id, v\.npy has 5 vectors"):
        vector_files.read(path)


def test_int8_arrays_are_vectors(tmp_path: Path) -> None:
    file = vector_files.read(npy(tmp_path / "v.npy", dtypes.encode(VECTORS, "int8")))
    assert file.dtype == "int8"
    assert file.vectors.dtype == np.float32
    assert np.abs(file.vectors).max() == 127


@pytest.mark.parametrize(
    ("dtype", "metadata", "words"),
    [
        ("binary", {"dtype": "float32"}, "lists of uint8, its metadata says float32"),
        ("float16", {"dtype": "int8"}, "lists of halffloat, its metadata says int8"),
        ("int8", {"dtype": "int4"}, "its metadata says int4"),
        ("binary", {"dtype": None}, "records that it stores bits"),
        ("binary", {"dimensions": 7}, r"vectors of 8 dimensions \(binary\), its metadata says 7"),
        ("float32", {"dtype": ["float32"]}, "its metadata says"),
    ],
)
def test_metadata_that_contradicts_the_column_is_refused(
    dtype: str, metadata: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write_stored(tmp_path / "v.parquet", VECTORS, dtype, metadata)
    with pytest.raises(BadInput, match=words):
        vector_files.read(path)


def test_ids_with_two_vectors_are_refused(tmp_path: Path) -> None:
    rows = VECTORS.tolist()
    path = table(tmp_path / "twice.parquet", id=["a", "b", "c", "b", "a"], vector=rows)
    for option in ("--vectors", "--baseline-vectors"):
        other = "--baseline-vectors" if option == "--vectors" else "--vectors"
        result = qembed(option, path, other, npy(tmp_path / "v.npy", VECTORS))
        assert result.exit_code == 2
        assert "2 ids in more than one row, first 'b' in rows 2 and 4" in result.stderr
    with pytest.raises(BadInput, match="row 2: no id"):
        vector_files.read(table(tmp_path / "none.parquet", id=["a", None, "c", "d", "e"], vector=rows))


def test_a_text_may_be_repeated_with_the_same_vector(tmp_path: Path) -> None:
    rows = [VECTORS[row].tolist() for row in (0, 1, 0)]
    file = vector_files.read(table(tmp_path / "same.parquet", text=["x", "y", "x"], vector=rows))
    assert np.array_equal(in_order(file, [Text("1", "x"), Text("2", "x"), Text("3", "y")]), VECTORS[[0, 0, 1]])
    with pytest.raises(BadInput, match="1 text in more than one row"):
        vector_files.read(table(tmp_path / "other.parquet", text=["x", "y", "x"], vector=VECTORS[:3].tolist()))


def test_two_texts_with_the_same_id_are_refused_if_matched_by_id(tmp_path: Path) -> None:
    file = vector_files.read(table(tmp_path / "v.parquet", id=["t0", "t1"], vector=VECTORS[:2].tolist()))
    with pytest.raises(BadInput, match="several texts have one id: 't0'"):
        in_order(file, [Text("t0", "one"), Text("t0", "another")])


def test_ids_are_read_by_their_value(tmp_path: Path) -> None:
    values = {"1": 1, "2": 2.0, "0a0b": b"\x0a\x0b"}
    for name, value in values.items():
        assert vector_files.read(table(tmp_path / "v.parquet", id=[value], vector=[[1.0]])).keys == [name]
    with pytest.raises(BadInput, match="row 1: the id True"):
        vector_files.read(table(tmp_path / "v.parquet", id=[True], vector=[[1.0]]))


def test_two_files_with_ids_are_matched_without_texts(tmp_path: Path) -> None:
    left = table(tmp_path / "a.parquet", id=["x", "y", "z"], vector=VECTORS[:3].tolist())
    right = table(tmp_path / "b.parquet", id=["z", "y", "x"], vector=VECTORS[2::-1].tolist())
    result = qembed("--vectors", left, "--baseline-vectors", right, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["results"]["overall"]["minimum"] == pytest.approx(1)
    assert {row["id"] for row in report["results"]["worst"]} == {"x", "y", "z"}
    more = table(tmp_path / "c.parquet", id=["w", "x", "y", "z"], vector=VECTORS[[3, 0, 1, 2]].tolist())
    for files, without in (((left, more), [1, 0]), ((more, left), [0, 1])):
        result = qembed("--vectors", files[0], "--baseline-vectors", files[1], "--json")
        assert result.exit_code == 0, result.stderr
        data = json.loads(result.stdout)["data"]
        assert (data["texts"], list(data["without_vector"].values())) == (3, without)
    other = table(tmp_path / "d.parquet", id=["v"], vector=VECTORS[:1].tolist())
    result = qembed("--vectors", left, "--baseline-vectors", other)
    assert result.exit_code == 2
    assert "no text has a vector in both" in result.stderr


def test_numbers_of_vectors_and_texts_must_match(tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("one\ntwo\n")
    path = npy(tmp_path / "v.npy", VECTORS)
    result = qembed("--vectors", path, "--baseline-vectors", path, "--data", data)
    assert result.exit_code == 2
    assert f"{path}: 5 vectors for 2 texts" in result.stderr


def test_sides_of_different_dimensions_are_refused(tmp_path: Path) -> None:
    left, right = npy(tmp_path / "a.npy", VECTORS), npy(tmp_path / "b.npy", VECTORS[:, :4])
    result = qembed("--vectors", left, "--baseline-vectors", right)
    assert result.exit_code == 2
    assert "cannot be compared: a.npy has 8 dimensions, b.npy has 4" in result.stderr


def test_unusable_and_repeated_vectors_are_counted(tmp_path: Path) -> None:
    broken = VECTORS.copy()
    broken[0], broken[1], broken[3] = np.nan, 0, broken[2]
    paths = npy(tmp_path / "a.npy", broken), npy(tmp_path / "b.npy", VECTORS)
    result = qembed("--vectors", paths[0], "--baseline-vectors", paths[1], "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["results"]["vectors"]["candidate"] == {"not_finite": 1, "zero": 1, "duplicate": 1}
