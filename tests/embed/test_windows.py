"""Texts as the model reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from qembed.embed import windows
from qembed.embed.rows import Row

from .conftest import Embed, expected, rejects


def test_texts_are_cleaned_prompted_and_truncated_as_on_the_server(embed: Embed, tmp_path: Path) -> None:
    from qembed.text.prompts import instruct

    (tmp_path / "in.txt").write_text("Cafe\u0301\u200b\n" + "word " * 100 + "\n", "utf-8")
    out = tmp_path / "out.npy"
    assert embed(tmp_path / "in.txt", "-o", out, "--truncate").exit_code == 0
    vectors = np.load(out)
    np.testing.assert_array_equal(vectors[0], expected("Café"))
    cut = next(
        n
        for n in range(100, 0, -1)
        if (vectors[1] == expected("word " * n)).all() or (vectors[1] == expected("word " * n + "word")).all()
    )
    assert cut >= 60
    (tmp_path / "in.txt").write_text("Cafe\u0301\u200b\n", "utf-8")
    assert embed(tmp_path / "in.txt", "-o", out, "--force", "--no-clean").exit_code == 0
    np.testing.assert_array_equal(np.load(out)[0], expected("Cafe\u0301\u200b"))
    assert embed(tmp_path / "in.txt", "-o", out, "--force", "--instruction", "Find coffee").exit_code == 0
    np.testing.assert_array_equal(np.load(out)[0], expected(instruct("Find coffee") + "Café"))


def test_a_text_with_a_token_beyond_the_table_is_rejected() -> None:
    encoder = Tokenizer(models.WordLevel({"known": 0, "strange": 7}))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    rows = iter([Row("line 1", "1", "known"), Row("line 2", "2", "known strange")])
    (window,) = windows.windows(rows, windows.Texts(tokenizer=encoder, limit=32, table_rows=7), windows.Position(), 0)
    assert [item.id for item in window.items] == ["1"]
    assert [(reject.id, "'strange'" in reject.reason) for reject in window.rejects] == [("2", True)]


def test_chunks_have_ids_positions_and_the_kept_columns(embed: Embed, tmp_path: Path) -> None:
    body = "\n\n".join(" ".join(f"This is sentence {n} of paragraph {p}." for n in range(5)) for p in range(3))
    rows = [
        {"id": "long", "text": body, "lang": "en"},
        {"id": "short", "text": " one ", "lang": "de"},
        {"id": "none", "text": " "},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.parquet"
    keep_options = ["--keep", "lang", "--keep", "text"]
    assert embed(tmp_path / "in.jsonl", "-o", out, "--chunk-tokens", "32", "--overlap", "10", *keep_options).exit_code == 4
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["id", "vector", "start", "end", "page", "lang", "text"]
    output_rows = table.to_pylist()
    parts = [row for row in output_rows if row["id"].startswith("long#")]
    assert [row["id"] for row in parts] == [f"long#{n}" for n in range(len(parts))]
    assert len(parts) > 3
    for row in parts:
        assert body[row["start"] : row["end"]] == row["text"]
        assert row["page"] is None
        assert row["lang"] == "en"
    assert {name: output_rows[-1][name] for name in ("id", "start", "end", "text", "lang")} == {
        "id": "short#0", "start": 1, "end": 4, "text": "one", "lang": "de",
    }  # fmt: skip
    assert rejects(tmp_path / "out.rejects.jsonl")[0]["id"] == "none"
