"""Parquet files, complete and empty."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet
import pytest

from qembed.embed import parquet
from qembed.embed.outputs import VectorBlock, VectorLayout


@pytest.mark.parametrize("rows", [0, 3])
def test_a_file_has_its_rows_in_one_group_and_vectors_uncompressed(rows: int) -> None:
    layout = VectorLayout("float32", "float32", 4, ["name"], {"model": "m"})
    block = VectorBlock(np.ones((rows, 4), np.float32), [str(row) for row in range(rows)], {"name": ["x"] * rows})
    content = parquet.whole_file(parquet.table(block, parquet.schema(layout, {"name": "string"}), layout))
    table = pyarrow.parquet.read_table(io.BytesIO(content))
    assert table.num_rows == rows
    assert table.column_names == ["id", "vector", "name"]
    if rows:
        group = pyarrow.parquet.read_metadata(io.BytesIO(content)).row_group(0)
        assert [group.column(place).compression for place in range(3)] == ["ZSTD", "UNCOMPRESSED", "ZSTD"]
