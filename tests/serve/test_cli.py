"""`qembed serve` without starting a server: --plan, errors and warnings."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from qembed.checkpoint.description import Checkpoint
from qembed.cli import group
from qembed.errors import BadInput
from qembed.serve import cli
from qembed.serve.startup_warnings import startup_warnings
from qembed.vllm import machine
from qembed.vllm.settings import ServerSettings
from tests.checkpoints import END
from tests.embedders import DENSE, PROMPTS, write_embedder


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["serve", "--int4", *map(str, arguments)])


def test_plan_lines_add_up_to_the_total(int4: Checkpoint) -> None:
    result = serve("--model", int4.folder, "--plan", "--json", "--device-memory", "T4", "--max-model-len", 128)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert sum(plan["bytes"].values()) == plan["total_bytes"]
    assert (plan["max_model_len"], plan["max_num_seqs"], plan["fits"]) == (128, 32, True)
    assert plan["device"] == {"kind": "cuda", "name": "T4", "memory_bytes": 15360 * 2**20, "free_bytes": 15360 * 2**20}


def test_the_plan_says_how_vectors_are_made(tmp_path: Path) -> None:
    folder = write_embedder(
        tmp_path / "model", pooling="mean", dense=[DENSE], normalize=False, prompts=PROMPTS, config={"is_causal": False}
    ).folder
    arguments = ["serve", "--fp16", "--model", str(folder), "--plan", "--device-memory", "cpu:8GiB"]
    as_json = CliRunner().invoke(group, [*arguments, "--json"])
    assert json.loads(as_json.output)["vectors"] == {
        "dimensions": 64,
        "matryoshka_dimensions": None,
        "attention": "bidirectional",
        "pooling": "mean",
        "appended_token": END,
        "dense": 1,
        "normalized": False,
        "default_prompt": "query",
        "lower_case": False,
    }
    lines = CliRunner().invoke(group, arguments).output.splitlines()
    (line,) = [line for line in lines if line.startswith("vectors have 64 numbers")]
    for part in ("mean", END, "bidirectional", "1 dense layer", "no unit length", "default prompt 'query'"):
        assert part in line
    normalized = CliRunner().invoke(group, [*arguments, "--normalize", "--default-prompt", ""])
    assert ", unit length, no default prompt" in normalized.output


def test_a_plan_that_does_not_fit_exits_with_1(int4: Checkpoint) -> None:
    result = serve("--model", int4.folder, "--plan", "--device-memory", "512MiB")
    assert result.exit_code == 1
    assert "does not fit: 512MiB has 512 MiB; " in result.output
    for line in ("token table", "linear layers", "keys and values", "activations", "CUDA graphs", "CUDA context", "total"):
        assert line in result.output


def test_the_plan_is_within_memory_or_refused(int4: Checkpoint) -> None:
    result = serve("--model", int4.folder, "--plan", "--device-memory", "L4", "--memory", "2GiB", "--json")
    assert json.loads(result.output)["total_bytes"] <= 2 * 2**30
    result = serve("--model", int4.folder, "--plan", "--device-memory", "L4", "--memory", "100MiB")
    assert result.exit_code == 2
    assert result.output.startswith("qembed: --memory 100 MiB is too little: 1 sequence of 64 tokens need 60")
    assert serve("--model", int4.folder, "--plan", "--memory", "lots").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-memory", "T4"], "--device-memory goes with --plan"),
        (["--plan", "--device-memory", "H9000"], "is none of T4, L4, A10G"),
        (["--plan", "--max-queue", "5"], "--max-queue 5 is less than --max-client-batch 2048"),
        (["--plan", "--engine-arg", "port=5"], "use --port"),
        (["--plan", "--hang-timeout", "4"], "--hang-timeout 4: at least 5 s, or 0"),
        (["--plan", "--allowed-host", "http://a"], "--allowed-host 'http://a'"),
        (["--plan", "--default-prompt", "x"], "--default-prompt 'x'"),
        (["--plan", "--api-key-file", "/nowhere/keys"], "/nowhere/keys: cannot be read"),
        (["--plan", "--max-model-len", "999999"], "256 positions"),
    ],
)
def test_bad_input_is_reported_in_one_line(int4: Checkpoint, arguments: list[str], message: str) -> None:
    result = serve("--model", int4.folder, *arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert message in result.output


def test_a_vllm_that_was_never_tried_is_warned_about(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, warned in (("0.1.0", "too old"), ("0.31.0", "never tried")):
        monkeypatch.setattr(machine, "vllm_version", lambda version=version: version)
        (warning,) = startup_warnings(ServerSettings(checkpoint), None)
        assert f"vLLM {version} " in warning
        assert warned in warning
        assert version not in "".join(startup_warnings(ServerSettings(checkpoint, engine="sglang"), None))


def test_serving_other_machines_without_key_or_tls_is_warned_about(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def warnings(key_file: Path | None = None, **settings: object) -> str:
        return "\n".join(startup_warnings(ServerSettings(checkpoint, **settings), key_file))  # type: ignore[arg-type]

    assert warnings() == warnings(host="localhost") == warnings(host="::1") == ""
    for host in ("0.0.0.0", "192.0.2.7", "::", ""):
        assert "no key is set (--api-key-file)" in warnings(host=host)
    assert "unencrypted" in warnings(host="0.0.0.0", keys={"a-long-key": ""})
    assert warnings(host="0.0.0.0", keys={"a-long-key": ""}, ssl_certfile="c", ssl_keyfile="k") == ""
    keys = tmp_path / "keys"
    keys.write_text("a-long-key")
    keys.chmod(0o644)
    assert "chmod 600" in warnings(keys, keys={"a-long-key": ""})
    assert "texts are not cleaned" in warnings(engine="sglang")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "/missing/m", "--log-format", "json"],
        ["--log-format=json", "--port", "none"],
        ["--log-format", "json", "--no-such-option"],
        ["--log-format=json", "--engine-arg", "port=5"],
    ],
)
def test_errors_are_json_lines_with_json_as_the_log_format(arguments: list[str]) -> None:
    result = serve(*arguments)
    assert result.exit_code == 2
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [line["level"] for line in lines] == ["error"]
    assert {"time", "message"} <= set(lines[0])
    result = serve(*arguments, "--json")
    assert json.loads(result.stdout)["error"]["message"] == lines[0]["message"]
    assert [json.loads(line)["message"] for line in result.stderr.splitlines()] == [lines[0]["message"]]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "file"), 1, "file: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.UsageError("both"), 2, "both"),
        (KeyError("x"), 1, "unexpected"),
    ],
)
def test_a_crash_is_a_json_line_with_json_as_the_log_format(
    error: BaseException, code: int, message: str, int4: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "find_served", fail)
    result = serve("--model", int4.folder, "--log-format", "json")
    assert result.exit_code == code
    (line,) = result.output.splitlines()
    assert message in json.loads(line)["message"]
    result = CliRunner().invoke(group, ["--debug", "serve", "--model", str(int4.folder), "--log-format", "json"])
    assert "Traceback" in json.loads(result.output)["traceback"] or code == 130


def test_what_libraries_write_is_json_with_json_as_the_log_format(int4: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any, **__: Any) -> None:
        warnings.warn("old", stacklevel=1)
        print("two\nlines", file=sys.stderr)
        sys.stderr.write("\r 10%\r 20%")
        sys.stderr.write(' done\n{"an": "object"}\n[1]\nno end')
        raise BadInput("é")

    monkeypatch.setattr(cli, "find_served", write)
    result = serve("--model", int4.folder, "--log-format", "json")
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line.get("message") for line in lines] == [*("old", "two", "lines", "10%", "20% done", None, "[1]", "no end", "é")]
    assert [line.get("level") for line in lines] == [*["warning"] * 5, None, "warning", "warning", "error"]
    assert result.stdout == ""


def test_the_plan_is_json_with_json_as_the_log_format(int4: Checkpoint) -> None:
    result = serve("--model", int4.folder, "--plan", "--log-format", "json", "--device-memory", "T4", "--max-model-len", 128)
    assert json.loads(result.output)["fits"]
