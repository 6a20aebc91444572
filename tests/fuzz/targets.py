"""Fuzz targets. A target takes bytes and fails with any error that its reader does not document."""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from qembed.cli import group
from qembed.embed import documents, journal
from qembed.embed.inputs import find
from qembed.embed.readers import Reading
from qembed.embed.spool import Spool
from qembed.errors import BadInput
from qembed.quantize.manifest import sealed
from qembed.serve.gate import request, rerank_request
from qembed.serve.gate.errors import Refused
from qembed.text.cleaning import clean
from qembed.vllm.gate_rules import Rules
from tests.checkpoints import write_checkpoint

CORPUS = Path(__file__).with_name("corpus")
Run = Callable[[bytes], None]
EXAMPLES = 20
"""Inputs per batch; the time is checked between batches."""
WORDS = [
    *(b"", b"\0", b"\xff", b"\n", b"\r", b'"', b"'", b"<", b">", b"&", b"-1", b"0", b"1e999", b"NaN", b"9" * 30, b"9" * 5000),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b"[" * 5000,
        b'{"a":' * 5000,
        b"<!--",
        b"-->",
        b"<![CDATA[",
        b"<?",
        b"<b>" * 3000,
        b"</",
        b"&#xD800;",
    ),
    *(
        b"../",
        b"/dev/zero",
        b"\\ud800",
        "\u0f73".encode() * 100,
        "\u202e".encode(),
        b"---\n",
        b"+++\n",
        b"obj",
        b"endobj",
        b"stream",
    ),
]
VALUES = [None, True, -1, 0, 1, 0.5, 10**9, 10**30, float("nan"), 1e300, "", "x", "../../x", "\ud800", [], {}, [[1]], {"a": {}}]


@dataclass(frozen=True)
class Target:
    """A function to run on inputs made from `seeds`. `is_json`: the values of a seed's JSON are changed, too.

    `prepare` takes a folder that does not exist yet and that the target may write to.
    """

    prepare: Callable[[Path], Run]
    seeds: Sequence[bytes]
    is_json: bool = False


def fuzz(target: Target, run: Run, seconds: float, seed: int) -> int:
    """Run the target on its seeds, then on random inputs for that time; returns the number of inputs.

    Raises:
        Exception: of the target, with the input as a note.
    """
    count = 0

    def run_noted(data: bytes) -> None:
        nonlocal count
        count += 1
        try:
            run(data)
        except Exception as error:
            error.add_note(f"input: {data[:2000]!r}")
            raise

    for data in target.seeds:
        run_noted(data)
    inputs = st.one_of(_edited_json(target.seeds), _edited(target.seeds)) if target.is_json else _edited(target.seeds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        limits = settings(
            max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        seeded(hash((seed, count)))(limits(given(inputs)(run_noted)))()
    return count


@st.composite
def _edited(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A seed with a few parts replaced by other parts or random bytes."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 5))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.integers(0, 40)))
        part = draw(st.one_of(st.sampled_from(WORDS), st.binary(max_size=8), st.just(data[begin:end] * 3)))
        data = data[:begin] + part + data[end:]
    return data


@st.composite
def _edited_json(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A JSON seed with up to three values replaced or removed."""
    value = json.loads(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        inner = value
        while isinstance(inner, dict | list) and inner:
            key = draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
            if not isinstance(inner[key], dict | list) or not inner[key] or draw(st.booleans()):
                change = draw(st.one_of(st.sampled_from(VALUES), st.integers(), st.text(max_size=5)))
                if draw(st.integers(0, 4)):
                    inner[key] = change
                else:
                    del inner[key]
                break
            inner = inner[key]
    return json.dumps(value).encode()


def _request(_: Path) -> Run:
    rules = Rules("", 100, [32, 64], {"query": "Query: "}, max_batch=8, allow_token_ids=True)

    def run(data: bytes) -> None:
        status = 200
        try:
            json.dumps(request.read(data, rules, len).body).encode()
        except Refused as error:
            status = error.status
            json.loads(error.body())
        assert status < 500

    return run


def _rerank(_: Path) -> Run:
    rules = Rules("", 100, [], instruction="judge", max_batch=8)

    def run(data: bytes) -> None:
        for path in ("/v1/rerank", "/v1/score"):
            status = 200
            try:
                pairs = rerank_request.read(data, rules, path)
                assert [pairs.query(index) for index in range(pairs.count)]
                json.dumps([pairs.body, *pairs.texts]).encode()
            except Refused as error:
                status = error.status
                json.loads(error.body())
            assert status < 500

    return run


def _cleaning(_: Path) -> Run:
    def run(data: bytes) -> None:
        text = data.decode(errors="replace")
        once = clean(text)
        assert clean(once) == once
        assert not {"\0", "\x1b", "\u202e", "\ufeff"} & set(once)

    return run


def _verified(name: str) -> Callable[[Path], Run]:
    """`--verify` of a checkpoint whose file `name` is the input, with the manifest sealed again."""

    def prepare(folder: Path) -> Run:
        folder.mkdir()
        source, output = write_checkpoint(folder / "tiny", "qwen3").folder, folder / "out"
        command = ["quantize", "--model", str(source), "--output", str(output), "--calibration-texts", "64", "--device", "cpu"]
        result = CliRunner().invoke(group, command)
        assert result.exit_code == 0, result.output
        manifest = json.loads((output / "qembed.json").read_bytes())

        def run(data: bytes) -> None:
            if name == "qembed.json":
                with suppress(ValueError, TypeError, RecursionError):
                    data = json.dumps(sealed({**manifest, **json.loads(data)})).encode()
            else:
                files = {**manifest["files"], name: hashlib.sha256(data).hexdigest()}
                (output / "qembed.json").write_text(json.dumps(sealed({**manifest, "files": files})))
            (output / name).write_bytes(data)
            result = CliRunner().invoke(group, ["quantize", "--verify", str(output), "--device", "cpu"])
            assert result.exit_code in (0, 1), result.output
            assert "unexpected" not in result.output, result.output
            assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)

        return run

    return prepare


def _journal(folder: Path) -> Run:
    folder.mkdir()

    def run(data: bytes) -> None:
        (folder / journal.NAME).write_bytes(data)
        message = ""
        try:
            with journal.opened(folder, {"a": 1}, force=False) as opened:
                journal.check_sizes(folder, opened.totals, {})
        except BadInput as error:
            message = str(error)
        assert "\n" not in message

    return run


def _spool(folder: Path) -> Run:
    folder.mkdir()

    def run(data: bytes) -> None:
        spool = Spool(folder)
        (folder / "batches-0").write_bytes(data)
        for vectors, reasons in spool.begin(0).values():
            assert vectors.ndim == 2
            assert all(isinstance(reason, str) for reason in reasons.values())

    return run


def _document(kind: str) -> Callable[[Path], Run]:
    def prepare(_: Path) -> Run:
        def run(data: bytes) -> None:
            message = ""
            try:
                documents.read(data, kind).text.encode()
            except documents.NotReadable as error:
                message = str(error)
            assert "\n" not in message
            assert "crashes" not in message

        return run

    return prepare


def _rows(suffix: str) -> Callable[[Path], Run]:
    def prepare(folder: Path) -> Run:
        folder.mkdir()
        path = folder / f"a{suffix}"

        def run(data: bytes) -> None:
            path.write_bytes(data)
            message = ""
            try:
                for row in Reading(find(str(path), None, "lines")).rows():
                    assert (row.id + (row.text or "")).encode()
            except BadInput as error:
                message = str(error)
            assert "\n" not in message

        return run

    return prepare


def _corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def _docx_edited(prepare: Callable[[Path], Run]) -> Callable[[Path], Run]:
    """The input is the document's XML; it is put into a valid archive, so that edits reach the parser."""
    frame = _corpus("docx")[0]

    def outer(folder: Path) -> Run:
        run = prepare(folder)

        def inner(data: bytes) -> None:
            out = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(frame)) as whole, zipfile.ZipFile(out, "w") as archive:
                for name in whole.namelist():
                    archive.writestr(name, data if name == "word/document.xml" else whole.read(name))
            run(out.getvalue())

        return inner

    return outer


def _docx_xml() -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(_corpus("docx")[0])) as archive:
        return [archive.read("word/document.xml")]


TARGETS = {
    "request": Target(_request, _corpus("request"), is_json=True),
    "rerank": Target(_rerank, _corpus("rerank"), is_json=True),
    "cleaning": Target(_cleaning, _corpus("cleaning")),
    "config": Target(_verified("config.json"), _corpus("config"), is_json=True),
    "manifest": Target(_verified("qembed.json"), _corpus("manifest"), is_json=True),
    "journal": Target(_journal, _corpus("journal")),
    "spool": Target(_spool, _corpus("spool")),
    "pdf": Target(_document(".pdf"), _corpus("pdf")),
    "docx": Target(_document(".docx"), _corpus("docx")),
    "docx-xml": Target(_docx_edited(_document(".docx")), _docx_xml()),
    "html": Target(_document(".html"), _corpus("html")),
    "markdown": Target(_document(".md"), _corpus("markdown")),
    "csv": Target(_rows(".csv"), _corpus("csv")),
    "jsonl": Target(_rows(".jsonl"), _corpus("jsonl")),
    "parquet": Target(_rows(".parquet"), _corpus("parquet")),
}
