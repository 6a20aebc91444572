"""Inputs that a command once got wrong, one folder each in tests/cases, with the right result.

To add a case: a folder `tests/cases/NN-name` with the smallest input that shows it, and here a function with the decorator
`@case("NN-name")`. It gets the folder and pytest's request (`request.getfixturevalue("embed")`); `marks` are those of a test.
"""

from __future__ import annotations

import codecs
import csv
import http.client
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet
import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import SAMPLE, find
from qembed.eval.readers import beir
from qembed.serve.gate.errors import Refused
from qembed.serve.gate.request import read
from qembed.serve.startup_warnings import startup_warnings
from qembed.serve.vector_facts import vectors_line
from qembed.vectors import reference
from qembed.vllm.arguments import pooler_config
from qembed.vllm.arguments import rules as server_rules
from qembed.vllm.devices import Target
from qembed.vllm.gate_rules import Rules
from qembed.vllm.kernels import Cpu
from qembed.vllm.settings import Launch, ServerSettings, resolve
from tests.checkpoint.test_vocabulary import ROWS, added, changed
from tests.checkpoints import write_placeholder
from tests.e2e.conftest import int4_server
from tests.embed.conftest import Embed, embed, expected
from tests.embedders import write_dense
from tests.eval.tasks.conftest import metric_named
from tests.eval.tasks.test_retrieval_data import measure
from tests.test_oracle import assert_same, oracle
from tests.vllm.conftest import CONFIG

__all__ = ["changed", "embed", "int4_server"]  # fixtures

CASES = Path(__file__).parent / "cases"
Check = Callable[[Path, pytest.FixtureRequest], None]
CHECKS: dict[str, tuple[Check, tuple[pytest.MarkDecorator, ...]]] = {}


def case(name: str, *marks: pytest.MarkDecorator) -> Callable[[Check], Check]:
    """Register the check of a folder."""

    def register(check: Check) -> Check:
        CHECKS[name] = (check, marks)
        return check

    return register


def tools(request: pytest.FixtureRequest) -> tuple[Embed, Path]:
    """`qembed embed` with the stand-in for an engine, and an empty folder."""
    return request.getfixturevalue("embed"), request.getfixturevalue("tmp_path")


def strict(line: str) -> Any:
    """JSON as other parsers read it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def strict_lines(path: Path) -> list[Any]:
    return [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]


@case("01-java-h2c", pytest.mark.vllm)
def a_request_to_upgrade_is_answered_as_http_1(folder: Path, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("int4_server")
    head, _, body = (folder / "raw.http").read_bytes().partition(b"\r\n\r\n")
    body_with_model = body.replace(b'"sample"', json.dumps(server.model).encode())
    head = head.replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % len(body_with_model))
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head + b"\r\n\r\n" + body_with_model)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, response.version) == (200, 11)
        assert len(json.loads(response.read())["data"]) == 1


@case("02-tsv-quotes")
def quotes_in_tsv_are_literal(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    assert run(folder / "dialog.tsv", "-o", out / "out.jsonl", "--keep", "text").exit_code == 0
    texts = ['"I came home late.', 'Nobody was awake."', "The lamp was still on."]
    assert [row["text"] for row in strict_lines(out / "out.jsonl")] == texts


@case("03-token-beyond-vocab")
def a_token_beyond_the_table_is_named(folder: Path, request: pytest.FixtureRequest) -> None:
    def add(content: dict[str, Any]) -> None:
        content["added_tokens"].append(added(ROWS))

    vocabulary = request.getfixturevalue("changed")("tokenizer.json", add).vocabulary()
    texts = (folder / "poison.txt").read_text().splitlines()
    assert [vocabulary.token_beyond(text) for text in texts] == ["[CUST]" if "[CUST]" in text else None for text in texts]
    assert any("[CUST]" in text for text in texts)


def overlaid(folder: Path, target: Path) -> Checkpoint:
    """The sample in `target`, with the files of `folder` in place of its own."""
    shutil.copytree(find(SAMPLE).folder, target)
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return Checkpoint("copy", target)


def assert_vectors_are_those_of_sentence_transformers(checkpoint: Checkpoint) -> None:
    texts = ["A river behind the house.", "Bread"]
    inputs = [checkpoint.embedder.document_prompt + text for text in texts]
    assert_same(reference.embed(reference.load(checkpoint), inputs), oracle(checkpoint.folder, texts))


def launched(checkpoint: Checkpoint) -> Launch:
    return resolve(ServerSettings(checkpoint), Target("cpu", "CPU"), Cpu(), 1)


@case("04-dense-module", pytest.mark.slow)
def a_dense_module_is_computed(folder: Path, request: pytest.FixtureRequest) -> None:
    checkpoint = overlaid(folder, request.getfixturevalue("tmp_path") / "copy")
    (checkpoint.folder / "2_Dense").rename(checkpoint.folder / "dense")
    write_dense(checkpoint.folder / "2_Dense", json.loads((checkpoint.folder / "dense" / "config.json").read_text()))
    assert launched(checkpoint).width == 64
    assert_vectors_are_those_of_sentence_transformers(checkpoint)


@case("05-mean-pooling", pytest.mark.slow)
def both_forms_of_mean_pooling_are_read(folder: Path, request: pytest.FixtureRequest) -> None:
    for form in ("old", "new"):
        checkpoint = overlaid(folder / form, request.getfixturevalue("tmp_path") / form)
        assert_vectors_are_those_of_sentence_transformers(checkpoint)
        launch = launched(checkpoint)
        assert launch.longest_step >= launch.max_model_len == checkpoint.embedder.positions
        assert pooler_config(launch)["seq_pooling_type"] == "MEAN"


@case("06-max-seq-length")
def the_context_is_max_seq_length(folder: Path, request: pytest.FixtureRequest) -> None:
    assert launched(overlaid(folder, request.getfixturevalue("tmp_path") / "copy")).max_model_len == 512


@case("07-beir-dangling-qrels")
def judgements_of_missing_passages_are_left_out(folder: Path, _: pytest.FixtureRequest) -> None:
    outcome = measure(beir.read(folder / "missingdoc"))
    assert (metric_named(outcome, "nDCG@10").baseline, metric_named(outcome, "nDCG@10").count) == (1, 5)
    assert outcome.notes == [
        "left out: 1 judgement of passages that are not in corpus.jsonl",
        "left out: 1 judged query without a relevant passage",
    ]


@case("08-beir-self-title")
def a_query_does_not_find_the_passage_with_its_own_id(folder: Path, _: pytest.FixtureRequest) -> None:
    outcome = measure(beir.read(folder / "selftitle"))
    assert metric_named(outcome, "nDCG@10").baseline == 1
    assert outcome.notes == ["6 queries with a passage of the same id: that passage is no result, as in BEIR"]


@case("09-docx-lost-text")
def word_documents_are_read_whole(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    assert run(folder, "-o", out / "out.jsonl", "--keep", "text", "--chunk-tokens", 60).exit_code == 0
    controls, tracked = (row["text"] for row in strict_lines(out / "out.jsonl"))
    assert "The warranty lasts five years." in controls
    assert "Customer: Northern Printing House" in controls
    assert tracked == "The payment is due within ninety days."


@case("10-markdown-front-matter")
def front_matter_with_crlf_is_left_out(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    assert run(folder / "crlf.md", "-o", out / "out.jsonl", "--keep", "text").exit_code == 0
    assert [row["text"] for row in strict_lines(out / "out.jsonl")] == ["Head\n\nBody text."]


@case("11-nan-json")
def json_holds_no_nan(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    for name, rows in (("out.jsonl", "out.jsonl"), ("out.npy", "out.ids.jsonl")):
        result = run(folder / "nanprice.parquet", "-o", out / name, "--keep", "price", "--json")
        assert result.exit_code == 0, result.output
        assert strict(result.stdout)["vectors"] == 3
        assert [row["price"] for row in strict_lines(out / rows)] == [1.5, None, 2.0]


@case("12-nul-kept-text")
def kept_text_holds_no_nul(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    texts = ["Invoice 42 of the printer shop", "soft\u00adhyphen and zero\u200bwidth", "plain"]
    for suffix in ("parquet", "jsonl", "csv", "npy"):
        assert run(folder / "nul.jsonl", "-o", out / f"out.{suffix}", "--keep", "text").exit_code == 0
    assert pyarrow.parquet.read_table(out / "out.parquet")["text"].to_pylist() == texts
    assert [row["text"] for row in strict_lines(out / "out.jsonl")] == texts
    assert [row["text"] for row in strict_lines(out / "out.ids.jsonl")] == texts
    with (out / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts
    np.testing.assert_array_equal(np.load(out / "out.npy")[0], expected(texts[0]))


@case("13-dimensions")
def any_dimensions_from_32_to_the_width_are_given(folder: Path, request: pytest.FixtureRequest) -> None:
    wide = write_placeholder(request.getfixturevalue("tmp_path") / "wide", {**CONFIG, "hidden_size": 2560})
    rules = server_rules(launched(wide), "", 0)
    assert read((folder / "request.json").read_bytes(), rules, len).body["dimensions"] == 1536
    for size, allowed in ((31, False), (32, True), (384, True), (2560, True), (2561, False)):
        assert rules.allows(size) is wide.embedder.allows(size) is allowed


@case("14-no-normalize", pytest.mark.slow)
def without_normalize_vectors_have_the_length_that_the_model_gives(folder: Path, request: pytest.FixtureRequest) -> None:
    checkpoint = overlaid(folder, request.getfixturevalue("tmp_path") / "copy")
    assert_vectors_are_those_of_sentence_transformers(checkpoint)
    launch = launched(checkpoint)
    assert pooler_config(launch)["use_activation"] is False
    assert "no unit length" in vectors_line(launch)
    assert any("--normalize" in warning for warning in startup_warnings(launch.settings, None))
    assert ServerSettings(checkpoint, normalize=True).normalized


@case("18-default-prompt-name", pytest.mark.slow)
def the_default_prompt_goes_before_every_text(folder: Path, request: pytest.FixtureRequest) -> None:
    checkpoint = overlaid(folder, request.getfixturevalue("tmp_path") / "copy")
    assert_vectors_are_those_of_sentence_transformers(checkpoint)
    rules = server_rules(launched(checkpoint), "", 0)
    assert read(b'{"input": "a"}', rules, len).inputs == ["Q: a"]
    assert read(b'{"input": "a", "prompt_name": ""}', rules, len).inputs == ["a"]
    assert read(b'{"input": "a", "prompt_name": "passage"}', rules, len).inputs == ["P: a"]


@case("15-duplicate-header")
def two_columns_of_one_name_are_refused(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    refused = run(folder / "dupheader.csv", "-o", out / "out.npy")
    assert refused.exit_code == 2
    assert "dupheader.csv: 2 columns are named 'text' (2, 3)" in refused.stderr
    assert "--text-column" in refused.stderr
    for column, text in (("2", "first"), ("3", "second")):
        assert run(folder / "dupheader.csv", "-o", out / "out.npy", "--text-column", column, "--force").exit_code == 0
        np.testing.assert_array_equal(np.load(out / "out.npy"), [expected(text)])


@case("16-http-edges")
def a_body_may_begin_with_a_byte_order_mark(folder: Path, _: pytest.FixtureRequest) -> None:
    body = (folder / "bom.json").read_bytes()
    assert body.startswith(codecs.BOM_UTF8)
    rules = Rules(folder="", max_model_len=10, dimensions=[128], prompts={}, max_batch=3, max_body=10_000)
    assert read(body, rules, len).inputs == [json.loads(body.decode("utf-8-sig"))["input"]]
    assert read(b'{"input": "a", "dimensions": 128.0}', rules, len).body["dimensions"] == 128
    with pytest.raises(Refused, match="list") as refused:
        read(b'{"input": [["a", "b"]]}', rules, len)
    assert "token" not in str(refused.value)


@case("17-parquet-bytes-id")
def binary_ids_become_hexadecimal(folder: Path, request: pytest.FixtureRequest) -> None:
    run, out = tools(request)
    assert run(folder / "binid.parquet", "-o", out / "out.parquet").exit_code == 0
    assert pyarrow.parquet.read_table(out / "out.parquet")["id"].to_pylist() == ["0102", "fffe"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, (_, marks) in sorted(CHECKS.items())])
def test_case(name: str, request: pytest.FixtureRequest) -> None:
    CHECKS[name][0](CASES / name, request)


def test_every_case_has_a_check() -> None:
    assert {path.name for path in CASES.iterdir() if path.is_dir()} == set(CHECKS)
