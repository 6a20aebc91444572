"""A document that takes too much time or memory is one reject; entries of a folder that are not files are skipped by name."""

from __future__ import annotations

import io
import os
import signal
import socket
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qembed.embed import document_process, documents
from qembed.embed.documents import NotReadable

from .conftest import Embed, rejects
from .test_documents import pdf, word

QUADRATIC = b"<!--" * 300_000
PAGE = b"<p>A page."


def reason(content: bytes, kind: str) -> str:
    with pytest.raises(NotReadable) as error:
        documents.read(content, kind)
    return str(error.value)


def unpacking_to(size: int) -> bytes:
    """A DOCX file whose directory says that its first part has `size` bytes."""
    content = word("A paragraph.")
    at = content.index(b"PK\x01\x02") + 24
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


def test_a_document_that_takes_too_long_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_process, "SECONDS_OF_OTHERS", 1)
    monkeypatch.setattr(document_process, "SECONDS_PER_MIB", 0)
    assert reason(QUADRATIC, ".html") == "takes more than 1 s to read"
    assert documents.read(PAGE, ".html").text == "A page."


def test_a_hanging_parser_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    documents.read(PAGE, ".html")
    assert document_process._process is not None
    os.kill(document_process._process._child.pid, signal.SIGSTOP)
    monkeypatch.setattr(document_process, "PATIENCE", 0.1)
    assert reason(PAGE, ".html") == "takes more than 10 s to read"
    monkeypatch.undo()
    assert documents.read(PAGE, ".html").text == "A page."


def test_a_document_that_takes_too_much_memory_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_process, "MEMORY", 2**28)
    assert reason(b"<b>x</b>" * 500_000, ".html") == "takes more than 256 MiB of memory to read"
    assert documents.read(PAGE, ".html").text == "A page."


def test_a_parser_killed_between_two_documents_is_restarted() -> None:
    documents.read(PAGE, ".html")
    assert document_process._process is not None
    document_process._process._child.kill()
    document_process._process._child.wait()
    assert documents.read(PAGE, ".html").text == "A page."


def test_an_archive_that_unpacks_to_too_much_is_rejected() -> None:
    assert "unpacks to 2,048 MiB" in reason(unpacking_to(2**31 - 1), ".docx")


def test_parts_larger_than_their_declared_size_are_cut() -> None:
    """Reading stops at the size in the archive's directory."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * 10**7)
    content = out.getvalue()
    at = content.index(b"PK\x01\x02") + 24
    assert "damaged" in reason(content[:at] + struct.pack("<I", 10) + content[at + 4 :], ".docx")


def test_a_cell_that_spans_millions_of_columns() -> None:
    span = b'<w:tcPr><w:gridSpan w:val="50000000"/>'
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(word("A paragraph."))) as content, zipfile.ZipFile(out, "w") as archive:
        for name in content.namelist():
            archive.writestr(name, content.read(name).replace(b"<w:tcPr>", span))
    assert documents.read(out.getvalue(), ".docx").text == "A paragraph.\n\nleft\tright"


def test_a_page_that_a_pdf_has_a_hundred_thousand_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(document_process.SECONDS, ".pdf", 1)
    monkeypatch.setattr(document_process, "SECONDS_PER_MIB", 0)
    content = pdf("The page.").replace(b"/Kids [3 0 R]", b"/Kids [" + b"3 0 R " * 100_000 + b"]")
    assert reason(content, ".pdf").startswith(("takes more than", "damaged PDF"))


def test_texts_beyond_the_limit_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_TEXT", 10)
    assert "at most 10 are read" in reason(b"x" * 11, ".txt")


def test_modules_of_the_working_directory_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bs4.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    document_process.close()
    assert documents.read(PAGE, ".html").text == "A page."
    assert not (tmp_path / "ran").exists()


def test_hostile_documents_among_others(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_process, "SECONDS_OF_OTHERS", 1)
    monkeypatch.setattr(document_process, "SECONDS_PER_MIB", 0)
    monkeypatch.setattr(documents, "LARGEST", 2 * 10**6)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.html").write_bytes(PAGE)
    (docs / "b.html").write_bytes(QUADRATIC)
    (docs / "c.docx").write_bytes(unpacking_to(2**31 - 1))
    (docs / "d.docx").write_bytes(word("A letter."))
    (docs / "e.pdf").write_bytes(b"x" * 2_000_001)
    result = embed(docs, "-o", tmp_path / "out.npy")
    assert result.exit_code == 4, result.output
    assert np.load(tmp_path / "out.npy").shape == (2, 16)
    reasons = {reject["id"]: reject["reason"] for reject in rejects(tmp_path / "out.rejects.jsonl")}
    assert list(reasons) == ["b.html", "c.docx", "e.pdf"]
    assert reasons["e.pdf"].startswith("larger than")


def test_entries_of_a_folder_that_are_not_files_are_skipped_by_name(embed: Embed, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("one\n")
    os.mkfifo(docs / "pipe.txt")
    (docs / "broken.txt").symlink_to("nowhere")
    (docs / "zero.txt").symlink_to("/dev/zero")
    Path(os.fsdecode(bytes(docs) + b"/caf\xe9.txt")).write_text("two\n")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(docs / "socket.txt"))
        result = embed(docs, "-o", tmp_path / "out.npy")
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "out.npy").shape == (1, 16)
    lines = [line for line in result.stderr.splitlines() if ": skipped: " in line]
    for name, why in (
        ("pipe.txt", "pipe"),
        ("broken.txt", "link"),
        ("zero.txt", "device"),
        ("caf\\xe9.txt", "not UTF-8"),
        ("socket.txt", "socket"),
    ):
        assert any(name in line and why in line for line in lines), (name, lines)


def test_a_device_is_no_input(embed: Embed, tmp_path: Path) -> None:
    result = embed("/dev/zero", "-o", tmp_path / "out.npy", "--input-format", "txt")
    assert result.exit_code == 2
    assert "device" in result.stderr
