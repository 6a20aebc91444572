"""SGLang's arguments. SGLang is not installed for the tests, so the command is checked but not run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qembed.checkpoint.description import Checkpoint
from qembed.cli import group
from qembed.errors import BadInput, MissingExtra
from qembed.vllm import sglang
from qembed.vllm.devices import PRESETS
from qembed.vllm.kernels import Cpu
from qembed.vllm.settings import ServerSettings, resolve
from tests.embedders import DENSE, PROMPTS, write_embedder


def test_limits_become_sglangs_arguments(int4: Checkpoint) -> None:
    settings = ServerSettings(
        int4, engine="sglang", max_model_len=128, max_num_seqs=7, max_num_batched_tokens=99, max_queue=3000
    )
    launch = resolve(settings, PRESETS["L4"], Cpu(), 1234)
    argv = sglang.arguments(launch)
    options = dict(zip(argv, [*argv[1:], ""], strict=True))
    assert options["--model-path"] == str(int4.folder.resolve())
    assert (options["--context-length"], options["--max-running-requests"], options["--port"]) == ("128", "7", "1234")
    assert (options["--max-prefill-tokens"], options["--max-queued-requests"]) == ("99", "3000")
    assert options["--max-total-tokens"] == str(launch.plan.kv_tokens)
    assert json.loads(options["--json-model-override-args"])["is_matryoshka"] is True
    assert "--is-embedding" in argv
    assert "--trust-remote-code" not in argv


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"pooling": "mean"}, "means of all tokens"),
        ({"config": {"is_causal": False}}, "bidirectional"),
        ({"dense": [DENSE]}, "dense layer"),
        ({"normalize": False}, "no unit length"),
        ({"transformer": {"do_lower_case": True}}, "lower case"),
        ({"prompts": PROMPTS}, "default prompt"),
    ],
)
def test_embedders_that_sglang_computes_otherwise_are_refused(
    arguments: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "find_spec", lambda _: True)
    checkpoint = write_embedder(tmp_path / "model", **arguments)
    with pytest.raises(BadInput, match=reason):
        sglang.check_settings(ServerSettings(checkpoint, engine="sglang", clean=False))


def test_features_that_sglang_lacks_are_refused(
    int4: Checkpoint, int8_table: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingExtra, match="SGLang is not installed"):
        sglang.check(ServerSettings(int4))
    monkeypatch.setattr(sglang, "find_spec", lambda _: True)
    with pytest.raises(BadInput, match="INT8 token table needs qembed's vLLM plugin"):
        sglang.check(ServerSettings(int8_table))
    with pytest.raises(BadInput, match="`ps` shows them"):
        sglang.check(ServerSettings(int4, keys={"a-secret-key": ""}))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_print_command_is_ready_to_paste(int4: Checkpoint, engine: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-secret-key\n")
    arguments = ["serve", "--int4", "--model", str(int4.folder), "--engine", engine, "--print-command", "--dtype", "float32"]
    if engine == "vllm":
        arguments += ["--api-key-file", str(keys), "--engine-arg", "max-log-len=5"]
    result = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    words = shlex.split(result.output)
    assert ("sglang.launch_server" if engine == "sglang" else "qembed.serve.server_process") in words
    assert str(int4.folder.resolve()) in words
    assert "a-secret-key" not in result.output
    result = CliRunner().invoke(group, [*arguments, "--json"], catch_exceptions=False)
    printed = json.loads(result.stdout)
    assert printed["command"] == words[-len(printed["command"]) :]
    assert len(words) == len(printed["command"]) + len(printed["environment"]) + (1 if printed["environment"] else 0)
