"""What vLLM is told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qembed.checkpoint import Checkpoint
from qembed.errors import BadInput
from qembed.serve.settings import Launch, Settings, arguments, environment, resolve


def told(launch: Launch, option: str) -> str:
    argv = arguments(launch)
    return argv[argv.index(option) + 1]


def test_vllm_gets_the_limits_that_were_asked_for(checkpoint: Checkpoint) -> None:
    asked = Settings(checkpoint, max_num_seqs=7, max_num_batched_tokens=99, max_model_len=128, served_model_name="mine")
    launch = resolve(asked, "cpu", "float32", 1234)
    assert told(launch, "--max-num-seqs") == "7"
    assert told(launch, "--max-num-batched-tokens") == "99"
    assert told(launch, "--max-model-len") == "128"
    assert told(launch, "--served-model-name") == "mine"
    assert told(launch, "--port") == "1234"
    assert told(launch, "--kv-cache-memory-bytes") == str(launch.plan.kv_cache)


def test_defaults_come_from_the_checkpoint_and_the_machine(checkpoint: Checkpoint) -> None:
    launch = resolve(Settings(checkpoint), "cuda", "float16", 8000)
    assert told(launch, "--max-model-len") == "256"
    assert told(launch, "--max-num-seqs") == "32"
    assert told(launch, "--max-num-batched-tokens") == "2048"
    assert told(launch, "--dtype") == "float16"
    assert told(launch, "--served-model-name") == "tiny"
    assert launch.url == "http://127.0.0.1:8000/v1"
    assert json.loads(told(launch, "--hf-overrides")) == {"is_matryoshka": True, "matryoshka_dimensions": [32, 64]}


def test_no_code_of_the_checkpoint_is_run_and_only_safetensors_are_read(checkpoint: Checkpoint) -> None:
    launch = resolve(Settings(checkpoint), "cpu", "float32", 1)
    assert "--trust-remote-code" not in arguments(launch)
    assert told(launch, "--load-format") == "safetensors"


def test_more_than_the_model_can_do_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="256 positions"):
        resolve(Settings(checkpoint, max_model_len=257), "cpu", "float32", 1)
    with pytest.raises(BadInput, match="--max-num-batched-tokens 31"):
        resolve(Settings(checkpoint, max_num_batched_tokens=31), "cpu", "float32", 1)


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("box", "box")])
def test_the_url_is_one_that_a_client_can_use(checkpoint: Checkpoint, host: str, url: str) -> None:
    assert resolve(Settings(checkpoint, host=host), "cpu", "float32", 80).url == f"http://{url}:80/v1"


def test_a_cpu_gets_its_cores_and_the_planned_cache(checkpoint: Checkpoint) -> None:
    launch = resolve(Settings(checkpoint), "cpu", "bfloat16", 1)
    env = environment(launch, {"VLLM_CPU_KVCACHE_SPACE": "40", "HOME": "/h"}, [0, 2])
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0,2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in env
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == "1"
    assert env["HOME"] == "/h"
    assert environment(launch, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, [0])["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_int4_in_float32_needs_the_plugins_kernel_and_nothing_else_does(checkpoint: Checkpoint, int4: Checkpoint) -> None:
    launch = resolve(Settings(int4), "cpu", "float32", 1)
    assert environment(launch, {"VLLM_DISABLED_KERNELS": "Other"}, [0])["VLLM_DISABLED_KERNELS"] == "Other,CPUWNA16LinearKernel"
    for other in (
        replace(launch, dtype="bfloat16"),
        replace(launch, device="cuda"),
        resolve(Settings(checkpoint), "cpu", "float32", 1),
    ):
        assert "VLLM_DISABLED_KERNELS" not in environment(other, {}, [0])


def test_an_int8_table_is_asked_of_the_plugin_only_where_there_is_none_yet(int4: Checkpoint, int8_table: Checkpoint) -> None:
    made = resolve(Settings(int4, token_table="int8"), "cpu", "float32", 1)
    overrides = json.loads(told(made, "--hf-overrides"))
    assert overrides["quantization_config"] == {
        "quant_method": "qembed_awq",
        "bits": 4,
        "group_size": 32,
        "token_table": "int8",
    }
    stored = resolve(Settings(int8_table, token_table="int8"), "cpu", "float32", 1)
    untouched = resolve(Settings(int4), "cpu", "float32", 1)
    for launch in (stored, untouched):
        assert "quantization_config" not in json.loads(told(launch, "--hf-overrides"))
    assert [launch.token_table for launch in (made, stored, untouched)] == ["int8", "int8", "float32"]
    assert environment(stored, {}, [0])["VLLM_DISABLED_KERNELS"] == "CPUWNA16LinearKernel"


def test_an_int8_table_is_planned_at_its_size(int4: Checkpoint) -> None:
    assert resolve(Settings(int4), "cpu", "float32", 1).plan.token_table == 10 * 64 * 4
    assert resolve(Settings(int4, token_table="int8"), "cpu", "float32", 1).plan.token_table == 10 * 64 + 10 * 4 + 64 * 4


def test_an_int8_table_in_a_checkpoint_that_is_not_quantized_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="--token-table int8 goes with an INT4 checkpoint"):
        resolve(Settings(checkpoint, token_table="int8"), "cpu", "float32", 1)
