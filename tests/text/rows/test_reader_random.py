"""For any file, every command's reader gives rows or a one-line error, and texts that can be written as UTF-8."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qembed.embed.inputs import find
from qembed.embed.readers import Reading
from qembed.errors import BadInput
from qembed.eval import texts
from qembed.eval.readers import tables
from qembed.quantize import calibration_texts
from qembed.text.rows.options import RowOptions

HEADS = [b"", b"id,text\n", b"id;text\n", b"id\ttext\n", b"\xff\xfe", b"sep=;\n"]
PARTS = [
    *(b"text", b"id", b"_id", b"label", b"score", b",", b";", b"\t", b"|", b'"', b'""', b"\n", b"\r", b"\r\n", b"1", b"2,5"),
    *(b"\xff", b"\0", b"\xf6", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\xe2\x80\xa8", b"sep=;"),
    *(b'{"text": "a"}', b'{"id": 1.0, "text": "b"}', b"{", b"}", b"[", b"NaN", b"1e999", b"\\ud800"),
]
READERS: list[Callable[[Path, RowOptions], Any]] = [
    lambda path, options: list(Reading(find(str(path), None, "lines"), options=options).rows()),
    lambda path, options: texts.read(path, options).texts,
    lambda path, options: list(calibration_texts._rows(path, None, options)),
    lambda path, options: tables.pairs(str(path), None, options).first,
    lambda path, options: tables.labelled(str(path), None, options).texts,
]


@pytest.mark.parametrize("seed", range(300))
def test_random_files(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    path = tmp_path / f"a.{draw.choice(['csv', 'tsv', 'jsonl', 'txt'])}"
    path.write_bytes(draw.choice(HEADS) + b"".join(draw.choices(PARTS, k=draw.randrange(40))))
    encoding = draw.choice([None, None, "cp1252", "utf-16", "utf-16-le", "shift_jis"])
    table = path.suffix in (".csv", ".tsv")
    options = RowOptions(draw.choice([None, ";"]) if table else None, encoding, not table or draw.random() < 0.8)
    for read in READERS:
        message = ""
        try:
            for row in read(path, options):
                assert (row.id + (row.text or "")).encode()
        except BadInput as error:
            message = str(error)
        assert "\n" not in message
        message.encode()
