"""Long documents: chunks on borders, with their places; and the formats that have readers of their own."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from qembed.embed import documents
from qembed.embed.chunking import chunks

from .conftest import Embed, rejects, tokenizer


def count(texts: Sequence[str]) -> list[int]:
    return [len(one.ids) for one in tokenizer().encode_batch(list(texts))]


def test_chunks_end_with_paragraphs_and_sentences() -> None:
    paragraphs = [" ".join(f"This is sentence {n} of paragraph {p}." for n in range(6)) for p in range(4)]
    text = "\n\n".join(paragraphs)
    found = [text[one.start : one.end] for one in chunks(text, 48, 0, count)]
    assert all(one.endswith(".") for one in found)
    assert all(one.startswith("This is sentence") for one in found)
    assert " ".join(found).split() == text.split()
    whole = [text[one.start : one.end] for one in chunks(text, max(count(paragraphs)) + 4, 0, count)]
    assert whole == paragraphs


def test_whatever_the_text_all_of_it_is_in_chunks_of_no_more_tokens_with_no_more_overlap_than_asked() -> None:
    draw = random.Random(0)
    words = ["alpha", "beta", "x", "Übung", "слово", "漢字", "don't"]
    kinds: list[Any] = [
        lambda: (
            " ".join(draw.choice(words) for _ in range(draw.randint(1, 40))) + draw.choice([". ", "! ", ".\n", "\n\n", " "])
        ),
        lambda: "汉字测试。" * draw.randint(1, 9),
        lambda: "a" * draw.randint(1, 900),
        lambda: " \n" * draw.randint(1, 9),
        lambda: "\n\n \n".join("x" for _ in range(draw.randint(1, 60))),
        lambda: "\u0301" * draw.randint(1, 50),
    ]
    for _ in range(40):
        text = "".join(draw.choice(kinds)() for _ in range(draw.randint(1, 30)))
        size = draw.choice([4, 16, 64, 512])
        overlap = draw.choice([0, 2, size // 4])
        spans = list(chunks(text, size, overlap, count))
        covered = bytearray(len(text))
        for before, after in pairwise(spans):
            assert before.start < after.start
            assert before.end < after.end
            if after.start < before.end:
                assert count([text[after.start : before.end]])[0] <= overlap + 1  # the appended token is not shared
        for span in spans:
            part = text[span.start : span.end]
            assert part == part.strip()
            assert count([part])[0] <= size or len(part) == 1
            covered[span.start : span.end] = b"\1" * len(part)
        assert all(seen or letter.isspace() for seen, letter in zip(covered, text, strict=True))


def test_adjacent_chunks_share_the_overlap() -> None:
    text = " ".join(f"Sentence number {n} is short." for n in range(60))
    spans = list(chunks(text, 64, 16, count))
    assert len(spans) > 4
    for before, after in pairwise(spans):
        assert 4 <= count([text[after.start : before.end]])[0] <= 17
    without_stops = "word " * 500
    spans = list(chunks(without_stops, 64, 16, count))
    assert all(after.start < before.end for before, after in pairwise(spans))


def test_chunks_have_their_ids_and_places_and_the_kept_columns(embed: Embed, tmp_path: Path) -> None:
    body = "\n\n".join(" ".join(f"This is sentence {n} of paragraph {p}." for n in range(5)) for p in range(3))
    rows = [
        {"id": "long", "text": body, "lang": "en"},
        {"id": "short", "text": " one ", "lang": "de"},
        {"id": "none", "text": " "},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.parquet"
    kept = ["--keep", "lang", "--keep", "text"]
    assert embed(tmp_path / "in.jsonl", "-o", out, "--chunk-tokens", "32", "--overlap", "10", *kept).exit_code == 4
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["id", "vector", "start", "end", "page", "lang", "text"]
    made = table.to_pylist()
    parts = [row for row in made if row["id"].startswith("long#")]
    assert [row["id"] for row in parts] == [f"long#{n}" for n in range(len(parts))]
    assert len(parts) > 3
    for row in parts:
        assert body[row["start"] : row["end"]] == row["text"]
        assert row["page"] is None
        assert row["lang"] == "en"
    assert {name: made[-1][name] for name in ("id", "start", "end", "text", "lang")} == {
        "id": "short#0", "start": 1, "end": 4, "text": "one", "lang": "de",
    }  # fmt: skip
    assert rejects(tmp_path / "out.rejects.jsonl")[0]["id"] == "none"


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(pages)))
    bodies = [b"<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode()]
    font = b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
        at = f"{4 + 2 * number} 0 R".encode()
        bodies.append(b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] " + font + b" /Contents " + at + b" >>")
        bodies.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1)
    return out + head + table + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(bodies) + 1, len(out))


def word(*paragraphs: str) -> bytes:
    import docx

    document = docx.Document()
    for text in paragraphs:
        document.add_paragraph(text)
    row = document.add_table(1, 2).rows[0]
    row.cells[0].text, row.cells[1].text = "left", "right"
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def test_each_kind_of_document() -> None:
    read = documents.read(pdf("The first page.", "The second page."), ".pdf")
    assert read.text.split("\n\n") == ["The first page.", "The second page."]
    assert [read.page(read.text.index(word)) for word in ("first", "second")] == [1, 2]
    assert documents.read(word("One paragraph.", "", "Another."), ".docx").text == "One paragraph.\n\nAnother.\n\nleft\tright"
    html = (
        b"<title>T</title><script>no()</script><h1>Head &amp; tail</h1><p>Some <b>bold</b>\n text.<p>More<br>lines<!-- no -->"
    )
    assert documents.read(html, ".html").text == "T\n\nHead & tail\n\nSome bold text.\n\nMore\nlines"
    markdown = (
        b"---\ntitle: x\n---\n# Head\n\nSome *emphasis* and [a link](http://x).\n\n- one\n- two\n\n|a|b|\n|---|---|\n|1|2|\n"
    )
    text = documents.read(markdown, ".md").text
    assert text.startswith("Head\n\nSome emphasis and a link.\n\none\n\ntwo")
    assert "title" not in text


@pytest.mark.parametrize("kind", [".pdf", ".docx"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"%PDF-1.4\nbroken", b"PK\x03\x04broken"])
def test_a_damaged_document_is_not_readable(kind: str, content: bytes) -> None:
    with pytest.raises(documents.NotReadable, match="damaged"):
        documents.read(content, kind)


def test_a_folder_of_documents_in_chunks_with_pages(embed: Embed, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    pages = [" ".join(f"Sentence {n} on page {page}." for n in range(8)) for page in (1, 2, 3)]
    (docs / "a.pdf").write_bytes(pdf(*pages))
    (docs / "b.docx").write_bytes(word("A paragraph of a letter."))
    (docs / "c.html").write_text("<p>A page of the web.</p>")
    (docs / "d.md").write_text("# Notes\n\nSomething noted.")
    (docs / "e.txt").write_text("One line.\nAnother line of the same document.\n")
    (docs / "f.pdf").write_bytes(b"broken")
    (docs / "g.txt").write_bytes(b"\xff")
    out = tmp_path / "out.parquet"
    done = embed(docs, "-o", out, "--chunk-tokens", "40", "--keep", "text")
    assert done.exit_code == 4, done.output
    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert {row["id"].split("#")[0] for row in rows} == {"a.pdf", "b.docx", "c.html", "d.md", "e.txt"}
    assert [row["text"] for row in rows if row["id"].startswith("e.txt")] == ["One line.\nAnother line of the same document."]
    for row in rows:
        assert (row["page"] is not None) == row["id"].startswith("a.pdf")
        if row["page"] is not None:
            assert f"on page {row['page']}." in row["text"]
    assert {row["page"] for row in rows} == {1, 2, 3, None}
    told = rejects(tmp_path / "out.rejects.jsonl")
    assert [(one["id"], one["reason"].split(":")[0].split(" (")[0]) for one in told] == [
        ("f.pdf", "damaged PDF"),
        ("g.txt", "not UTF-8"),
    ]
