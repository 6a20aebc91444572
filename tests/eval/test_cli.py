"""`qembed eval` from the command line, with the INT4 side through transformers or fake servers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from qembed.cli import group
from qembed.errors import QembedError
from qembed.eval import evaluation, texts
from qembed.vectors import sources
from tests.eval.conftest import SERVED

DATA = [
    {"id": "a", "text": "Where do swifts sleep?", "kind": "query", "language": "en"},
    {"id": "b", "text": "Mauersegler schlafen im Flug.", "language": "de"},
    {"id": "c", "text": "def f(x):\n    return x + 1", "kind": "code", "language": "en"},
    {"id": "d", "text": "far too long for it " * 20, "kind": "document", "language": "en"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in DATA))
    return path


def qembed(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["eval", *map(str, arguments)])


def evaluate(int4: Path, data: Path, *more: object) -> Result:
    return qembed("--model", int4, "--engine", "transformers", "--data", data, *more)


def one_line(result: Result) -> str:
    """Standard error, which must be one line."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return str(lines[0])


def test_standard_output_is_json_only(int4: Path, data: Path) -> None:
    result = evaluate(int4, data, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    ran = {"engine": "transformers", "model": "tiny-AWQ-INT4", "weights": "awq-int4", "device": "cpu", "dtype": "float32"}
    assert report["candidate"].items() >= ran.items()
    assert (
        report["baseline"].items()
        >= {"engine": "transformers", "model": "tiny", "weights": "float16", "dtype": "float32"}.items()
    )
    assert report["data"] == {
        **{"file": "texts.jsonl", "sha256": texts.read(data).sha256, "texts": 4, "limit": 96, "cut": 2},
        **{"duplicates": 0, "without_vector": {}, "unused_vectors": {}},
    }
    assert list(report["results"]["by_dimension"]) == ["32", "64", "128"]
    assert set(report["results"]["by_language"]) == {"en", "de"}
    assert set(report["results"]["by_kind"]) == {"query", "document", "code"}
    assert 0.5 < report["results"]["overall"]["mean"] < 0.9999
    assert report["verdict"] == {"passed": True, "failures": [], "undecided": []}
    assert report["gate"] == []


def test_the_numbers_equal_those_of_the_reference(int4: Path, fp16: Path, data: Path) -> None:
    from qembed.checkpoint.find import find
    from qembed.text.prompts import DEFAULT_INSTRUCTION, instruct
    from qembed.vectors import reference

    query = instruct(DEFAULT_INSTRUCTION) + DATA[0]["text"]
    inputs = [(query)[:95], *(line["text"][:95] for line in DATA[1:])]
    left, right = (reference.embed(reference.load(find(str(folder))), inputs) for folder in (int4, fp16))
    expected = (left * right).sum(axis=1)
    results = json.loads(evaluate(int4, data, "--json").stdout)["results"]
    assert results["overall"]["mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert results["overall"]["minimum"] == pytest.approx(expected.min(), abs=1e-5)
    assert results["by_kind"]["query"]["mean"] == pytest.approx(expected[0], abs=1e-5)


def test_tables_name_the_engines_and_the_number_of_cut_texts(int4: Path, data: Path) -> None:
    result = evaluate(int4, data)
    assert result.exit_code == 0, result.stderr
    for words in ("on cpu, computed in float32", "2 cut at 96 tokens", "Lowest cosines"):
        assert words in result.stdout


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_missed_threshold_is_exit_code_1_and_one_line(int4: Path, data: Path, more: list[str]) -> None:
    result = evaluate(int4, data, "--min-cosine", 0.99999, *more)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("qembed: mean cosine at dimension 128 is 0.")
    assert "below --min-cosine 0.99999" in result.stderr.splitlines()[-1]
    if more:
        assert json.loads(result.stdout)["verdict"]["passed"] is False
    assert evaluate(int4, data, "--min-cosine", 0.1, *more).exit_code == 0


def test_a_nan_fails_whatever_the_threshold(int4: Path, data: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "broken-AWQ-INT4"
    shutil.copytree(int4, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["norm.weight"][3] = torch.nan
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    result = evaluate(checkpoint, data, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["results"]["vectors"]["candidate"] == {
        **{"not_finite": 4, "zero": 0},
        "duplicate": 3,
    }
    assert "4 candidate vectors with NaN or infinity" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-cosine", "nan"], "--min-cosine nan: not within"),
        (["--min-cosine", "1.5"], "--min-cosine 1.5: not within"),
        (["--data", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--url", "http://127.0.0.1:1", "--engine", "vllm"], "leave one out"),
        (["--baseline-url", "http://127.0.0.1:1", "--baseline-model", "sample"], "leave --baseline-model out"),
        (["--url", "127.0.0.1:8000"], "not the URL of a server"),
        (["--url", "http://[::1"], "not the URL of a server"),
        (["--url", "http://127.0.0.1:99999"], "not the URL of a server"),
        (["--report", "/proc/page.html"], "/proc cannot be written"),
        (["--model", "no-such-folder"], "no-such-folder: no such folder"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(arguments: list[str], message: str) -> None:
    result = qembed(*arguments)
    assert result.exit_code == 2
    assert message in one_line(result)


def test_a_bad_file_is_refused_before_a_model_is_loaded(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "transformers", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    result = evaluate(int4, tmp_path / "bad.jsonl")
    assert result.exit_code == 2
    assert "line 2: not JSON" in one_line(result)


def test_a_single_text_is_compared_and_an_empty_file_refused(int4: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one line\n")
    results = json.loads(evaluate(int4, tmp_path / "one.txt", "--json").stdout)["results"]
    assert results["overall"]["count"] == 1
    assert results["overall"]["interval"] is None
    assert results["neighbours"] is None
    (tmp_path / "none.txt").write_text("\n \n")
    result = evaluate(int4, tmp_path / "none.txt")
    assert result.exit_code == 2
    assert "none.txt: holds no texts" in one_line(result)


def test_ctrl_c_is_130_and_names_the_cache(int4: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "compare", interrupted)
    result = evaluate(int4, data)
    assert result.exit_code == 130
    assert one_line(result) == "qembed: interrupted; computed vectors are in the cache: run the same command to continue"
    assert one_line(evaluate(int4, data, "--no-cache")) == "qembed: interrupted"


def test_an_int4_baseline_is_refused(int4: Path, data: Path) -> None:
    result = evaluate(int4, data, "--baseline-model", int4)
    assert result.exit_code == 2
    assert "the baseline is the original" in one_line(result)


def test_without_vllm_transformers_is_used_and_named(int4: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "has_vllm", lambda: False)
    result = qembed("--model", int4, "--data", data)
    assert result.exit_code == 0, result.stderr
    assert f"INT4 weights, through transformers {version('transformers')}" in result.stdout
    with_vllm = qembed("--model", int4, "--data", data, "--engine", "vllm")
    assert with_vllm.exit_code == 3
    assert "vLLM is not installed" in one_line(with_vllm)


def test_the_model_may_come_from_the_environment(int4: Path, data: Path) -> None:
    result = CliRunner(env={"QEMBED_MODEL": str(int4)}).invoke(
        group, ["eval", "--engine", "transformers", "--json", "--data", str(data)]
    )
    assert json.loads(result.stdout)["candidate"]["model"] == "tiny-AWQ-INT4"


def test_two_servers_need_no_checkpoint(
    start_server: Callable[[], Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    candidate, baseline = start_server(), start_server()
    candidate.noise = 0.1
    result = qembed("--url", candidate.url, "--baseline-url", baseline.url + "/v1/", "--data", data, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    inputs = ["Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:" + DATA[0]["text"]]
    inputs += [line["text"] for line in DATA[1:]]
    assert sorted(candidate.inputs) == sorted(baseline.inputs) == sorted(inputs)
    expected = [np.dot(candidate.vector(text), baseline.vector(text)) for text in inputs]
    norms = [np.linalg.norm(candidate.vector(text)) * np.linalg.norm(baseline.vector(text)) for text in inputs]
    assert report["results"]["overall"]["mean"] == pytest.approx(np.mean(np.divide(expected, norms)), abs=1e-6)
    assert report["candidate"].items() >= {"engine": "server", "model": SERVED, "dtype": None, "url": candidate.url}.items()
    assert report["data"]["limit"] is None


def test_a_servers_shorter_context_cuts_both_sides(int4: Path, data: Path, start_server: Callable[[], Any]) -> None:
    candidate, baseline = start_server(), start_server()
    baseline.limit = 20
    result = qembed("--model", int4, "--url", candidate.url, "--baseline-url", baseline.url, "--data", data, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["data"]["cut"] == 4
    assert sorted(candidate.inputs) == sorted(baseline.inputs)
    assert {len(text) for text in candidate.inputs} == {19}


def test_queries_to_servers_of_an_unknown_model_get_no_prompt_and_that_is_said(
    data: Path, start_server: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.eval.conftest.SERVED", "e5-mistral")
    candidate, baseline = start_server(), start_server()
    result = qembed("--url", candidate.url, "--baseline-url", baseline.url, "--data", data, "--json")
    assert result.exit_code == 0, result.stderr
    assert sorted(candidate.inputs) == sorted(baseline.inputs) == sorted(line["text"] for line in DATA)
    assert "prompts of e5-mistral are not known" in result.stderr


def test_documents_get_the_models_default_prompt(
    int4: Path, data: Path, start_server: Callable[[], Any], tmp_path: Path
) -> None:
    prompted = tmp_path / "prompted-AWQ-INT4"
    shutil.copytree(int4, prompted)
    prompts = {"prompts": {"passage": "P: "}, "default_prompt_name": "passage"}
    (prompted / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    candidate, baseline = start_server(), start_server()
    result = qembed("--model", prompted, "--url", candidate.url, "--baseline-url", baseline.url, "--data", data, "--json")
    assert result.exit_code == 0, result.stderr
    assert {text for text in candidate.inputs if not text.startswith("P: ")} == {DATA[0]["text"]}  # the query
    assert "its prompts are passage" in result.stderr


def test_the_error_for_texts_too_long_for_a_server_suggests_model(start_server: Callable[[], Any], data: Path) -> None:
    servers = [start_server(), start_server()]
    servers[1].limit, servers[1].refusal = 20, 400
    result = qembed("--url", servers[0].url, "--baseline-url", servers[1].url, "--data", data)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith(
        "; with --model, the checkpoint that is served, texts over 20 tokens are cut for both sides"
    )


def test_servers_of_different_dimensions_cannot_be_compared(start_server: Callable[[], Any], data: Path) -> None:
    candidate, baseline = start_server(), start_server()
    baseline.dimension = 32
    result = qembed("--url", candidate.url, "--baseline-url", baseline.url, "--data", data)
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line == f"qembed: the two sides cannot be compared: {SERVED} has 64 dimensions, {SERVED} has 32"


def test_no_server_at_the_url_is_one_line() -> None:
    result = qembed("--url", "http://127.0.0.1:1", "--baseline-url", "http://127.0.0.1:1")
    assert result.exit_code == 2
    assert "http://127.0.0.1:1: nothing answers there" in one_line(result)


def test_a_server_of_another_kind_is_one_line(start_server: Callable[[], Any]) -> None:
    url = start_server().url + "/elsewhere"
    result = qembed("--url", url, "--baseline-url", url)
    assert result.exit_code == 2
    assert "not an OpenAI-compatible server" in one_line(result)


def test_a_servers_description_of_itself_is_in_the_result(
    start_server: Callable[[], Any], data: Path, monkeypatch: Any
) -> None:
    candidate, baseline = start_server(), start_server()
    candidate.key, candidate.about = "first-key", {"dtype": "bfloat16", "device": "cpu", "weights": "awq-int4"}
    monkeypatch.setenv("QEMBED_API_KEY", "first-key,second-key")
    options = ("--url", candidate.url, "--baseline-url", baseline.url, "--data", data)
    report = json.loads(qembed(*options, "--json").stdout)
    assert report["candidate"].items() >= {**candidate.about, "version": "9.9"}.items()
    assert report["baseline"]["dtype"] is None
    output = qembed(*options).stdout
    assert "INT4 weights, a running server (vLLM 9.9)" in output
    assert "computed in bfloat16" in output
    assert "dtype not reported" in output


def test_only_requests_to_a_qembed_server_turn_its_default_prompt_off(start_server: Callable[[], Any], data: Path) -> None:
    candidate, baseline = start_server(), start_server()
    candidate.version = {"qembed": "0.1.0", "default_prompt": "query"}
    options = ("--url", candidate.url, "--baseline-url", baseline.url, "--data", data, "--json")
    assert qembed(*options).exit_code == 0
    assert candidate.fields == {"prompt_name="}
    assert baseline.fields == set()
    candidate.fields.clear()
    assert qembed(*options, "--no-cache", "--task", "speed", "--speed-batches", 1, "--speed-lengths", 3).exit_code == 0
    assert candidate.fields == {"prompt_name="}


def test_the_error_for_a_missing_key_names_the_options(start_server: Callable[[], Any], data: Path, monkeypatch: Any) -> None:
    server = start_server()
    server.key = "first-key"
    monkeypatch.delenv("QEMBED_API_KEY", raising=False)
    result = qembed("--url", server.url, "--baseline-url", server.url, "--data", data)
    assert result.exit_code == 2
    assert one_line(result) == f"qembed: {server.url}: the server asks for a key; give --api-key-file or QEMBED_API_KEY"


def test_the_key_may_come_from_a_file(start_server: Callable[[], Any], data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("QEMBED_API_KEY", "wrong-key")
    (tmp_path / "keys").write_text("# the first is sent\nfirst-key\nsecond-key\n")
    candidate, baseline = start_server(), start_server()
    candidate.key = baseline.key = "first-key"
    candidate.about = {"dtype": "bfloat16", "device": "cpu", "weights": "awq-int4"}
    options = ("--url", candidate.url, "--baseline-url", baseline.url, "--data", data, "--json")
    assert qembed(*options).exit_code == 2
    result = qembed(*options, "--api-key-file", tmp_path / "keys")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["candidate"]["dtype"] == "bfloat16"
    (tmp_path / "keys").write_text("# none\n")
    assert "keys: no key in it" in one_line(qembed(*options, "--api-key-file", tmp_path / "keys"))
    result = qembed("--model", "sample", "--data", data, "--api-key-file", tmp_path / "keys")
    assert result.exit_code == 2
    assert "--api-key-file is for running servers" in one_line(result)


def test_the_result_is_printed_if_the_report_cannot_be_written(
    int4: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise QembedError("disk full")

    monkeypatch.setattr("qembed.eval.report.files.replace", full)
    result = evaluate(int4, data, "--json", "--report", tmp_path / "page.html", "--min-cosine", "1")
    assert result.exit_code == 2
    (report,) = map(json.loads, result.stdout.splitlines())
    assert report["results"]["overall"]["count"] > 0
    assert report["error"]["message"] == "disk full"
    assert [line for line in result.stderr.splitlines() if line.startswith("qembed: ")][1:] == ["qembed: disk full"]


def test_an_unexpected_error_is_not_the_exit_code_of_a_missed_threshold(
    int4: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(evaluation, "compare", broken)
    result = evaluate(int4, data)
    assert result.exit_code == 2
    assert one_line(result).startswith("qembed: unexpected: ZeroDivisionError: by hand")


def test_a_server_that_fails_half_way_is_one_line(start_server: Callable[[], Any], data: Path) -> None:
    candidate, baseline = start_server(), start_server()
    baseline.refusal = 400
    result = qembed("--url", candidate.url, "--baseline-url", baseline.url, "--data", data)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("qembed: ")
    assert "Traceback" not in result.stderr


def test_an_interrupt_closes_the_engine(data: Path) -> None:
    exits: list[bool] = []

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    class Opened:
        """Not a generator, whose `finally` would run even if it was never closed."""

        def __enter__(self) -> sources.Source:
            return sources.Source("vllm", "m", None, None, None, None, None, interrupted)

        def __exit__(self, *_: object) -> None:
            exits.append(True)

    side = sources.Side(None, lambda _: Opened())
    with pytest.raises(KeyboardInterrupt):
        evaluation.compare(
            side,
            side,
            evaluation.Reader({}, None),
            texts.read(data),
            evaluation.EvaluationSettings("fp16"),
            Console(quiet=True),
        )
    assert exits == [True]


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from qembed.cli import group;"
        "result = CliRunner().invoke(group, ['eval', '--help']); assert result.exit_code == 0, result.output;"
        "assert '  qembed eval --model sample --min-cosine 0.95     as a gate' in result.output.splitlines();"
        "assert 'QEMBED_MODEL' in result.output and '--min-cosine' in result.output;"
        "print([name for name in ('torch', 'transformers', 'vllm', 'openai', 'numpy') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
