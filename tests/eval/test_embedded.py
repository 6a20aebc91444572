"""Vectors written by `qembed embed` are evaluated on their input file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from qembed.cli import group
from tests.embed.conftest import Embed, embed  # noqa: F401 - the fixture

TEXTS = ["an audio player", "a PDF viewer", "Müllers Büro", "3,5 % of all"]
SOURCES: dict[str, tuple[bytes, list[str]]] = {
    "plain.txt": ("\n".join(TEXTS).encode(), []),
    "plain.jsonl": ("\n".join(json.dumps({"text": text}) for text in TEXTS).encode(), []),
    "ids.jsonl": ("\n".join(json.dumps({"id": n * 7, "text": text}) for n, text in enumerate(TEXTS)).encode(), []),
    "beir.jsonl": ("\n".join(json.dumps({"_id": f"d{n}", "text": text}) for n, text in enumerate(TEXTS)).encode(), []),
    "some.jsonl": ("\n".join(json.dumps({"text": t} | ({"id": "x"} if t == TEXTS[1] else {})) for t in TEXTS).encode(), []),
    "table.csv": ("\n".join(["key,text", *(f'{n}.0,"{text}"' for n, text in enumerate(TEXTS))]).encode(), []),
    "keys.csv": ("\n".join(["key,text", *(f'k{n},"{text}"' for n, text in enumerate(TEXTS))]).encode(), ["--id-column", "key"]),
    "sheet.csv": ("\r\n".join(["id;body", *(f"{n};{t}" for n, t in enumerate(TEXTS))]).encode("cp1252"),
                  ["--text-column", "body", "--encoding", "cp1252"]),
    "bare.tsv": ("\n".join(f"{n}\t{t}" for n, t in enumerate(TEXTS)).encode(),
                 ["--no-header", "--text-column", "2", "--id-column", "1"]),
}  # fmt: skip


FORMATS = {
    ".parquet": ("float32", "float16", "int8", "binary"),
    ".jsonl": ("float32", "float16", "int8"),
    ".csv": ("float32", "float16", "int8"),
    ".npy": ("float32", "float16", "int8"),
    ".fvecs": ("float32",),
}


def check(source: Path, options: list[str], run: Embed) -> None:
    out = source.with_name("out.parquet")
    embedding = run(source, "-o", out, *options)
    assert embedding.exit_code == 0, embedding.output
    arguments = ["--vectors", out, "--baseline-vectors", out, "--data", source, *options, "--json", "--no-cache"]
    result = CliRunner().invoke(group, ["eval", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["data"]["texts"] == len(TEXTS)


@pytest.mark.parametrize("name", SOURCES)
def test_vectors_match_their_input_file(name: str, embed: Embed, tmp_path: Path) -> None:  # noqa: F811
    content, options = SOURCES[name]
    (tmp_path / name).write_bytes(content)
    check(tmp_path / name, options, embed)


@pytest.mark.parametrize(("suffix", "dtype"), [(suffix, dtype) for suffix, names in FORMATS.items() for dtype in names])
def test_every_format_and_dtype_is_read(suffix: str, dtype: str, embed: Embed, tmp_path: Path) -> None:  # noqa: F811
    source, exact, out = tmp_path / "in.jsonl", tmp_path / "exact.parquet", tmp_path / f"out{suffix}"
    # The second row is rejected, so matching by order alone would pair the rest wrongly.
    source.write_text("".join(json.dumps({"id": f"d{n}", "text": "" if n == 1 else TEXTS[n]}) + "\n" for n in range(4)))
    source.with_name("fewer.jsonl").write_text(f'{{"id": "d3", "text": "{TEXTS[3]}"}}\n')
    assert embed(source, "-o", exact).exit_code == 4
    assert embed(source, "-o", out, "--output-dtype", dtype).exit_code == 4
    source.write_text(source.read_text().replace('""', '"rejected before"'))
    result = CliRunner().invoke(
        group, ["eval", "--vectors", str(out), "--baseline-vectors", str(exact), "--data", str(source), "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["data"]["texts"] == 3
    assert report["data"]["without_vector"] == {"candidate": 1, "baseline": 1}
    assert report["results"]["overall"]["minimum"] > (0.6 if dtype == "binary" else 0.999)
    fewer = [*("--vectors", str(out), "--baseline-vectors", str(exact), "--data", str(source.with_name("fewer.jsonl")))]
    output = CliRunner().invoke(group, ["eval", *fewer])
    assert output.exit_code == 0, output.output
    assert "2 vectors of the candidate's file that no text belongs to" in output.stdout


def test_rows_that_were_rejected_are_left_out_with_a_note(embed: Embed, tmp_path: Path) -> None:  # noqa: F811
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    rows = [{"text": TEXTS[0]}, {"text": ""}, {"text": 5}, {"id": [1], "text": "a"}, {"body": "b"}, {"text": TEXTS[1]}]
    source.write_text("\n".join([*map(json.dumps, rows), "no JSON", json.dumps({"text": TEXTS[2]})]))
    assert embed(source, "-o", out).exit_code == 4
    stored = ["--vectors", str(out), "--baseline-vectors", str(out)]
    result = CliRunner().invoke(group, ["eval", *stored, "--data", str(source), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    assert (data["texts"], data["without_vector"]) == (3, {"candidate": 0, "baseline": 0})
    assert "in.jsonl: left out: 5 rows that cannot be embedded: line 2: the text is empty; line 3" in result.stderr
    source.write_text('{"text": ""}\n')
    refused = CliRunner().invoke(group, ["eval", *stored, "--data", str(source)])
    assert (refused.exit_code, "line 1: the text is empty" in refused.stderr) == (2, True)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".npy"])
def test_bits_in_a_format_that_does_not_record_them_are_refused(suffix: str, embed: Embed, tmp_path: Path) -> None:  # noqa: F811
    source, out = tmp_path / "in.txt", tmp_path / f"out{suffix}"
    source.write_text("\n".join(TEXTS))
    assert embed(source, "-o", out, "--output-dtype", "binary").exit_code == 0
    result = CliRunner().invoke(group, ["eval", "--vectors", str(out), "--baseline-vectors", str(out), "--data", str(source)])
    assert result.exit_code == 2
    assert "embed into .parquet" in result.stderr


@pytest.mark.parametrize(
    "ids", [None, pyarrow.array([1.0, None, 3.0, 4.5]), pyarrow.array([b"\1", b"\2", b"\3", b"\4"]), list("abcd")]
)
def test_parquet_with_ids_of_any_type(ids: object, embed: Embed, tmp_path: Path) -> None:  # noqa: F811
    table = pyarrow.table({"text": TEXTS} | ({} if ids is None else {"id": ids}))
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    check(tmp_path / "in.parquet", [], embed)


def test_columns_of_the_built_in_texts_cannot_be_chosen() -> None:
    for option, words in ((["--text-column", "x"], "--text-column applies to --data"), (["--delimiter", ";"], "--delimiter")):
        result = CliRunner().invoke(group, ["eval", "--model", "sample", *option])
        assert result.exit_code == 2
        assert words in result.stderr
