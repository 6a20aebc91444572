"""From texts to answers through `qembed embed`, `index` and `search`, in each stored dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qembed.text.prompts import DEFAULT_INSTRUCTION, instruct
from tests.eval.conftest import SERVED, FakeServer
from tests.search.conftest import json_output, qembed

TEXTS = [f"text number {number}" for number in range(60)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_embedded_indexed_and_searched(tmp_path: Path, start_server: Callable[[], FakeServer], dtype: str) -> None:
    fake = start_server()
    lines = [json.dumps({"id": f"doc{row}", "text": text, "price": row}) for row, text in enumerate(TEXTS)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    command = ["embed", tmp_path / "t.jsonl", "-o", tmp_path / "v.parquet", "--url", fake.url, "--output-dtype", dtype]
    code, _, err = qembed(*command, "--keep", "text", "--keep", "price")
    assert code == 0, err
    index = json_output("index", tmp_path / "v.parquet", "-o", tmp_path / "i.faiss")
    assert (index["model"], index["rows"], index["dimensions"], index["columns"]) == (SERVED, 60, 64, ["text", "price"])
    hits = json_output("search", "music", "--index", tmp_path / "i.faiss", "--url", fake.url, "-k", 60)["queries"][0]["hits"]
    vectors = np.array([fake.vector(text) for text in TEXTS])
    if dtype == "binary":
        vectors = np.where(vectors > 0, 1, -1) / 8
    cosines = vectors @ fake.vector(instruct(DEFAULT_INSTRUCTION) + "music")
    scores = {hit["id"]: hit["score"] for hit in hits}
    assert scores == pytest.approx({f"doc{row}": cosines[row] for row in range(60)}, abs={"int8": 0.01}.get(dtype, 1e-3))
    first = int(hits[0]["id"].removeprefix("doc"))
    assert hits[0]["columns"] == {"text": TEXTS[first], "price": first}
