"""SGLang's words for the same limits. It is not installed here: what is run is looked at, not run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from qembed.checkpoint.description import Checkpoint
from qembed.cli import group
from qembed.errors import BadInput, MissingExtra
from qembed.vllm import sglang
from qembed.vllm.devices import PRESETS
from qembed.vllm.kernels import Cpu
from qembed.vllm.settings import ServerSettings, resolve


def test_the_same_limits_in_sglangs_words(int4: Checkpoint) -> None:
    asked = ServerSettings(int4, engine="sglang", max_model_len=128, max_num_seqs=7, max_num_batched_tokens=99, max_queue=3000)
    launch = resolve(asked, PRESETS["L4"], Cpu(), 1234)
    argv = sglang.arguments(launch)
    told = dict(zip(argv, [*argv[1:], ""], strict=True))
    assert told["--model-path"] == str(int4.folder.resolve())
    assert (told["--context-length"], told["--max-running-requests"], told["--port"]) == ("128", "7", "1234")
    assert (told["--max-prefill-tokens"], told["--max-queued-requests"]) == ("99", "3000")
    assert told["--max-total-tokens"] == str(launch.plan.kv_tokens)
    assert json.loads(told["--json-model-override-args"])["is_matryoshka"] is True
    assert "--is-embedding" in argv
    assert "--trust-remote-code" not in argv


def test_what_sglang_cannot_do_is_told(int4: Checkpoint, int8_table: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtra, match="SGLang is not installed"):
        sglang.check(ServerSettings(int4))
    monkeypatch.setattr(sglang, "find_spec", lambda _: True)
    with pytest.raises(BadInput, match="INT8 token table needs qembed's vLLM plugin"):
        sglang.check(ServerSettings(int8_table))
    with pytest.raises(BadInput, match="`ps` shows them"):
        sglang.check(ServerSettings(int4, keys=("a-secret-key",)))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_command_is_printed_ready_to_paste_and_nothing_is_started(int4: Checkpoint, engine: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-secret-key\n")
    arguments = ["serve", "--int4", "--model", str(int4.folder), "--engine", engine, "--print-command", "--dtype", "float32"]
    if engine == "vllm":
        arguments += ["--api-key-file", str(keys), "--engine-arg", "max-log-len=5"]
    done = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    words = shlex.split(done.output)
    assert ("sglang.launch_server" if engine == "sglang" else "qembed.serve.server_process") in words
    assert str(int4.folder.resolve()) in words
    assert "a-secret-key" not in done.output
