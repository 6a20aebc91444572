"""Documents: the text of each format, and a folder of them in chunks."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet
import pytest

from qembed.embed import documents

from .conftest import Embed, rejects


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
    result = embed(docs, "-o", out, "--chunk-tokens", "40", "--keep", "text")
    assert result.exit_code == 4, result.output
    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert {row["id"].split("#")[0] for row in rows} == {"a.pdf", "b.docx", "c.html", "d.md", "e.txt"}
    assert [row["text"] for row in rows if row["id"].startswith("e.txt")] == ["One line.\nAnother line of the same document."]
    for row in rows:
        assert (row["page"] is not None) == row["id"].startswith("a.pdf")
        if row["page"] is not None:
            assert f"on page {row['page']}." in row["text"]
    assert {row["page"] for row in rows} == {1, 2, 3, None}
    rejected = rejects(tmp_path / "out.rejects.jsonl")
    assert [(reject["id"], reject["reason"].split(":")[0].split(" (")[0]) for reject in rejected] == [
        ("f.pdf", "damaged PDF"),
        ("g.txt", "not UTF-8"),
    ]
