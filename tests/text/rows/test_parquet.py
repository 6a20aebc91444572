"""Parquet: ids of every column type, and values without a Python type."""

from __future__ import annotations

import datetime
import decimal
import uuid
from pathlib import Path
from typing import Any

import pytest

from qembed.errors import BadInput
from qembed.text.rows.reader import opened
from qembed.text.rows.values import NoId, id_text

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
UUIDS = [uuid.UUID(int=n + 1) for n in range(2)]
RAW = [value.bytes for value in UUIDS]
DAY = datetime.date(2026, 11, 27)


def column(path: Path, values: Any, **options: Any) -> list[Any]:
    parquet.write_table(arrow.table({"id": values}), path, **options)
    with opened(path) as records:
        return [record.values["id"] for record in records.read({"id": "--id-column"})]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (arrow.array([b"\1\2", b"\xff"], arrow.binary()), ["0102", "ff"]),
        (arrow.array([b"\1\2", b"\xff"], arrow.large_binary()), ["0102", "ff"]),
        (arrow.array([b"\1\2", b"\xff\0"], arrow.binary(2)), ["0102", "ff00"]),
        (arrow.array(RAW, arrow.binary(16)), [raw.hex() for raw in RAW]),
        (arrow.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (arrow.array([b"\1", b"\2"]).dictionary_encode(), ["01", "02"]),
        (arrow.array(["a", "b"], arrow.large_string()), ["a", "b"]),
        (arrow.array([1.0, 2.0]), ["1", "2"]),
        (arrow.array([2**63, 1], arrow.uint64()), [str(2**63), "1"]),
        (arrow.array([decimal.Decimal("1.00"), decimal.Decimal("2.50")], arrow.decimal128(10, 2)), ["1", "2.50"]),
        (arrow.array([DAY, DAY]), ["2026-11-27"] * 2),
        (arrow.array([1, 10**9], arrow.timestamp("ns")), ["1970-01-01T00:00:00.000000001", "1970-01-01T00:00:01"]),
        (arrow.array([0.1, None, 3], arrow.float32()), ["0.1", None, "3"]),
        (arrow.array([0.1, None, 3], arrow.float16()), ["0.1", None, "3"]),
        (arrow.array([10**9, 0], arrow.timestamp("ns")), ["1970-01-01T00:00:01", "1970-01-01T00:00:00"]),
        (arrow.array([10**7, 1], arrow.int32()).cast(arrow.date32()), ["29349-01-26", "1970-01-02"]),
    ],
)
def test_ids_of_every_type(values: Any, expected: list[str], tmp_path: Path) -> None:
    assert [id_text(value) for value in column(tmp_path / "a.parquet", values)] == expected


@pytest.mark.parametrize(("kind", "first"), [(arrow.float16(), 2**11), (arrow.float32(), 2**24), (arrow.float64(), 2**53)])
def test_float_ids_that_another_integer_may_share_are_refused(kind: Any, first: int, tmp_path: Path) -> None:
    below, *others = column(tmp_path / "a.parquet", arrow.array([float(first - 1), float(first), float(first + 2)]).cast(kind))
    assert id_text(below) == str(first - 1)
    for value in others:
        with pytest.raises(NoId, match="lost digits"):
            id_text(value)


@pytest.mark.skipif(not hasattr(arrow, "uuid"), reason="pyarrow without UUIDs")
@pytest.mark.parametrize("store_schema", [True, False])
def test_uuids(store_schema: bool, tmp_path: Path) -> None:
    values = arrow.array(RAW, arrow.uuid())
    assert column(tmp_path / "a.parquet", values, store_schema=store_schema) == UUIDS


def test_duplicate_columns_are_refused_if_used(tmp_path: Path) -> None:
    table = arrow.table([arrow.array(["a"]), arrow.array(["b"]), arrow.array(["c"])], names=["text", "text", "id"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with opened(tmp_path / "a.parquet") as records, pytest.raises(BadInput, match=r"'text' \(1, 2\); rename one"):
        list(records.read({"text": "--text-column"}))
    with opened(tmp_path / "a.parquet") as records:
        assert [record.values for record in records.read({"id": "--id-column"})] == [{"id": "c"}]


def test_a_text_repeated_in_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    texts = arrow.DictionaryArray.from_arrays(arrow.array([0] * 3000, arrow.int32()), arrow.array(["y" * 2**22]))
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    with opened(tmp_path / "a.parquet") as source:
        values = [record.values["text"] for record in source.read({"text": ""})]
    assert len(values) == 3000
    assert len({id(value) for value in values[:1000]}) == 1


def test_a_row_group_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qembed.text.rows import parquet as reader

    parquet.write_table(arrow.table({"text": ["z" * 10**6], "other": ["z" * 10**7]}), tmp_path / "a.parquet")
    monkeypatch.setattr(reader, "LARGEST_GROUP", 2 * 10**6)
    with opened(tmp_path / "a.parquet") as source:
        assert len(list(source.read({"text": ""}))) == 1
    with opened(tmp_path / "a.parquet") as source, pytest.raises(BadInput, match="row group 1"):
        list(source.read({"other": ""}))


def test_repeated_texts_nulls_and_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    for values in (["a", None, "a", "\u00e4"] * 700, [b"a", None, b"\xff"] * 700):
        parquet.write_table(arrow.table({"text": values}), tmp_path / "a.parquet", row_group_size=1000)
        with opened(tmp_path / "a.parquet") as source:
            assert [record.values["text"] for record in source.read({"text": ""})] == values
