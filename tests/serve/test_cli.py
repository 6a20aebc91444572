"""What `qembed serve` says without starting anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qembed.checkpoint.description import Checkpoint
from qembed.cli import group
from qembed.serve.cli import _warnings
from qembed.vllm.settings import ServerSettings


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["serve", "--int4", *map(str, arguments)])


def test_the_plan_adds_up_and_nothing_is_started(int4: Checkpoint) -> None:
    done = serve("--model", int4.folder, "--plan", "--json", "--device-memory", "T4", "--max-model-len", 128)
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert sum(said["bytes"].values()) == said["total_bytes"]
    assert (said["max_model_len"], said["max_num_seqs"], said["fits"]) == (128, 32, True)
    assert said["device"] == {"kind": "cuda", "name": "T4", "memory_bytes": 15360 * 2**20, "free_bytes": 15360 * 2**20}


def test_a_plan_that_does_not_fit_is_exit_code_1_and_says_what_is_missing(int4: Checkpoint) -> None:
    done = serve("--model", int4.folder, "--plan", "--device-memory", "512MiB")
    assert done.exit_code == 1
    assert "does not fit: 512MiB has 512 MiB; " in done.output
    for line in ("token table", "linear layers", "KV cache", "activations", "CUDA graphs", "CUDA context", "total"):
        assert line in done.output


def test_memory_is_a_clear_no_or_a_plan_within_it(int4: Checkpoint) -> None:
    done = serve("--model", int4.folder, "--plan", "--device-memory", "L4", "--memory", "2GiB", "--json")
    assert json.loads(done.output)["total_bytes"] <= 2 * 2**30
    done = serve("--model", int4.folder, "--plan", "--device-memory", "L4", "--memory", "100MiB")
    assert done.exit_code == 2
    assert done.output.startswith("qembed: --memory 100 MiB is too little: 1 sequence of 64 tokens need 60")
    assert serve("--model", int4.folder, "--plan", "--memory", "lots").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device-memory", "T4"], "--device-memory goes with --plan"),
        (["--plan", "--device-memory", "H9000"], "is none of T4, L4, A10G"),
        (["--plan", "--max-queue", "5"], "--max-queue 5 is less than --max-client-batch 2048"),
        (["--plan", "--engine-arg", "port=5"], "use --port"),
        (["--plan", "--default-prompt", "x"], "--default-prompt 'x'"),
        (["--plan", "--api-key-file", "/nowhere/keys"], "/nowhere/keys: cannot be read"),
        (["--plan", "--max-model-len", "999999"], "256 positions"),
    ],
)
def test_what_cannot_be_is_one_line(int4: Checkpoint, arguments: list[str], told: str) -> None:
    done = serve("--model", int4.folder, *arguments)
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert told in done.output


def test_other_machines_without_a_key_or_without_tls_are_warned_of(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def said(key_file: Path | None = None, **settings: object) -> str:
        return "\n".join(_warnings(ServerSettings(checkpoint, **settings), key_file))  # type: ignore[arg-type]

    assert said() == said(host="localhost") == said(host="::1") == ""
    for host in ("0.0.0.0", "192.0.2.7", "::", ""):
        assert "no key is set (--api-key-file)" in said(host=host)
    assert "unencrypted" in said(host="0.0.0.0", keys=("a-long-key",))
    assert said(host="0.0.0.0", keys=("a-long-key",), ssl_certfile="c", ssl_keyfile="k") == ""
    keys = tmp_path / "keys"
    keys.write_text("a-long-key")
    keys.chmod(0o644)
    assert "chmod 600" in said(keys, keys=("a-long-key",))
    assert "texts are not cleaned" in said(engine="sglang")
