"""Vectors from files, on either side."""

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
from qembed.vectors import stored

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


def test_two_arrays_need_no_texts_and_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left, right = VECTORS, VECTORS + 0.1 * RANDOM.normal(size=VECTORS.shape).astype(np.float32)
    result = qembed("--vectors", npy(tmp_path / "a.npy", left), "--baseline-vectors", npy(tmp_path / "b.npy", right), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    expected = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(left, right, strict=True)]
    assert found["results"]["overall"]["mean"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["candidate"]["engine"] == "file"
    assert found["candidate"]["model"] == "a.npy"
    assert found["results"]["worst"][0]["id"] == f"row {int(np.argmin(expected)) + 1}"
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
    by_id = stored.read(table(tmp_path / "i.parquet", id=[f"t{row}" for row in order], embedding=rows))
    assert np.allclose(by_id.of(TEXTS), VECTORS)
    by_text = stored.read(table(tmp_path / "t.parquet", text=[f"text {row}" for row in order], vector=rows))
    assert np.allclose(by_text.of(TEXTS[1:3]), VECTORS[1:3])
    by_order = stored.read(table(tmp_path / "o.parquet", vector=rows))
    assert np.allclose(by_order.of(TEXTS), VECTORS[order])
    with pytest.raises(BadInput, match=r"no vector for 1 of 6 texts, by id: 'new'"):
        by_id.of([*TEXTS, Text("new", "x")])


def test_files_that_hold_no_vectors_are_named(tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(BadInput, match=words) as caught:
            stored.read(path)
        assert str(path) in str(caught.value)

    refused(tmp_path / "none.npy", "cannot be read: No such file")
    refused(tmp_path / "none.parquet", "cannot be read")
    refused(npy(tmp_path / "one.npy", np.zeros(3)), r"an array of floats \[texts, dimensions\] is needed")
    refused(npy(tmp_path / "int.npy", np.zeros((3, 2), int)), "an array of floats")
    refused(npy(tmp_path / "object.npy", np.array([[1.0, "a"]], object)), "not a .npy array")
    (tmp_path / "text.npy").write_text("no array")
    refused(tmp_path / "text.npy", "not a .npy array")
    (tmp_path / "empty.npy").write_text("")
    refused(tmp_path / "empty.npy", "not a .npy array")
    (tmp_path / "text.parquet").write_text("no table")
    refused(tmp_path / "text.parquet", "not a Parquet file")
    refused(table(tmp_path / "c.parquet", other=[1]), "no column vector or embedding; it has other")
    refused(table(tmp_path / "d.parquet", vector=[[1.0, 2.0], [1.0]]), "not all are vectors of one length")
    refused(table(tmp_path / "s.parquet", vector=[["a", "b"]]), "not all are vectors of numbers")
    refused(tmp_path / "v.csv", "vectors are read from .npy")


def test_vectors_and_texts_must_be_as_many(tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("one\ntwo\n")
    path = npy(tmp_path / "v.npy", VECTORS)
    result = qembed("--vectors", path, "--baseline-vectors", path, "--data", data)
    assert result.exit_code == 2
    assert f"{path}: 5 vectors for 2 texts" in result.stderr


def test_vectors_of_other_dimensions_are_refused(tmp_path: Path) -> None:
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
