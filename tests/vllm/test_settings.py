"""What is decided, and what vLLM is told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.vllm import kernels
from qembed.vllm.arguments import arguments, environment, rules
from qembed.vllm.devices import PRESETS, Target
from qembed.vllm.kernels import Cpu
from qembed.vllm.settings import Launch, ServerSettings, check_fits, resolve

CPU, L4, T4 = Target("cpu", "CPU"), PRESETS["L4"], PRESETS["T4"]
WITH_BFLOAT16 = Cpu(frozenset({"avx512f", "avx512_bf16"}))


def told(launch: Launch, option: str) -> str:
    argv = arguments(launch)
    return argv[argv.index(option) + 1]


def test_vllm_gets_the_limits_that_were_asked_for(checkpoint: Checkpoint) -> None:
    asked = ServerSettings(checkpoint, max_num_seqs=7, max_num_batched_tokens=99, max_model_len=128, served_model_name="mine")
    launch = resolve(asked, CPU, Cpu(), 1234)
    assert told(launch, "--max-num-seqs") == "7"
    assert told(launch, "--max-num-batched-tokens") == "99"
    assert told(launch, "--max-model-len") == "128"
    assert told(launch, "--served-model-name") == "mine"
    assert told(launch, "--port") == "1234"
    assert told(launch, "--kv-cache-memory-bytes") == str(launch.plan.kv_cache)


@pytest.mark.parametrize(("length", "whole"), [(99, True), (100, False)])
def test_texts_are_read_whole_where_the_longest_goes_into_a_step(checkpoint: Checkpoint, length: int, whole: bool) -> None:
    asked = ServerSettings(checkpoint, max_num_seqs=7, max_num_batched_tokens=99, max_model_len=length)
    assert ("--no-enable-chunked-prefill" in arguments(resolve(asked, CPU, Cpu(), 1))) is whole


def test_defaults_come_from_the_checkpoint_and_the_machine(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), L4, Cpu(), 8000)
    assert told(launch, "--max-model-len") == "256"
    assert told(launch, "--max-num-seqs") == "32"
    assert told(launch, "--max-num-batched-tokens") == "2048"
    assert told(launch, "--dtype") == "float16"
    assert told(launch, "--served-model-name") == "tiny"
    assert launch.url == "http://127.0.0.1:8000/v1"
    assert json.loads(told(launch, "--hf-overrides")) == {
        "is_matryoshka": True,
        "matryoshka_dimensions": [32, 64],
        "max_position_embeddings": 256,
    }


def test_no_code_of_the_checkpoint_is_run_and_only_safetensors_are_read(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), CPU, Cpu(), 1)
    assert "--trust-remote-code" not in arguments(launch)
    assert told(launch, "--load-format") == "safetensors"


def test_more_than_the_model_can_do_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="256 positions"):
        resolve(ServerSettings(checkpoint, max_model_len=257), CPU, Cpu(), 1)
    with pytest.raises(BadInput, match="--max-num-batched-tokens 31"):
        resolve(ServerSettings(checkpoint, max_num_batched_tokens=31, max_num_seqs=32), CPU, Cpu(), 1)


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("box", "box")])
def test_the_url_is_one_that_a_client_can_use(checkpoint: Checkpoint, host: str, url: str) -> None:
    assert resolve(ServerSettings(checkpoint, host=host), CPU, Cpu(), 80).url == f"http://{url}:80/v1"


def test_a_cpu_gets_its_cores_and_the_planned_cache(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), CPU, WITH_BFLOAT16, 1)
    env = environment(launch, {"VLLM_CPU_KVCACHE_SPACE": "40", "HOME": "/h"}, [0, 2])
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0,2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in env
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == "1"
    assert env["HOME"] == "/h"
    assert environment(launch, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, [0])["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize(("cores", "told"), [([0, 1, 2, 3], "0,2|1,3"), ([4], "4|4"), ([0, 1, 2], "0,2|1")])
def test_parallel_workers_of_a_cpu_have_cores_of_their_own(checkpoint: Checkpoint, cores: list[int], told: str) -> None:
    for size in ({"tensor_parallel_size": 2}, {"data_parallel_size": 2}):
        launch = resolve(ServerSettings(checkpoint, **size), CPU, Cpu(), 1)
        assert environment(launch, {}, cores)["VLLM_CPU_OMP_THREADS_BIND"] == told


def test_where_the_plugins_kernel_is_chosen_vllms_own_is_switched_off(checkpoint: Checkpoint, int4: Checkpoint) -> None:
    launch = resolve(ServerSettings(int4), CPU, Cpu(), 1)
    assert launch.choice.kernel == "qembed-torch"
    assert environment(launch, {"VLLM_DISABLED_KERNELS": "Other"}, [0])["VLLM_DISABLED_KERNELS"] == "Other,CPUWNA16LinearKernel"
    for other in (
        resolve(ServerSettings(int4), CPU, Cpu(kernels.AMX), 1),
        replace(launch, target=L4),
        resolve(ServerSettings(checkpoint), CPU, Cpu(), 1),
    ):
        assert "VLLM_DISABLED_KERNELS" not in environment(other, {}, [0])


def test_an_int8_table_is_asked_of_the_plugin_only_where_there_is_none_yet(int4: Checkpoint, int8_table: Checkpoint) -> None:
    made = resolve(ServerSettings(int4, token_table="int8"), CPU, Cpu(), 1)
    overrides = json.loads(told(made, "--hf-overrides"))
    assert overrides["quantization_config"] == {
        "quant_method": "qembed_awq",
        "bits": 4,
        "group_size": 32,
        "token_table": "int8",
    }
    stored = resolve(ServerSettings(int8_table, token_table="int8"), CPU, Cpu(), 1)
    untouched = resolve(ServerSettings(int4), CPU, Cpu(), 1)
    for launch in (stored, untouched):
        assert "quantization_config" not in json.loads(told(launch, "--hf-overrides"))
    assert [launch.token_table for launch in (made, stored, untouched)] == ["int8", "int8", "float16"]
    assert environment(stored, {}, [0])["VLLM_DISABLED_KERNELS"] == "CPUWNA16LinearKernel"


def test_an_int8_table_is_planned_at_its_size(int4: Checkpoint) -> None:
    assert resolve(ServerSettings(int4, token_table="int8"), CPU, Cpu(), 1).plan.token_table == 10 * 64 + 10 * 4 + 64 * 4


def test_beside_int4_on_a_cpu_a_float16_table_stays_one(int4: Checkpoint) -> None:
    kept = resolve(ServerSettings(int4), CPU, Cpu(), 1)
    assert (kept.token_table, kept.plan.token_table) == ("float16", 10 * 64 * 2)
    on_gpu = resolve(ServerSettings(int4), L4, Cpu(), 1)
    assert (on_gpu.token_table, on_gpu.plan.token_table) == ("float16", 10 * 64 * 2)
    wide = resolve(ServerSettings(int4, dtype="float32"), L4, Cpu(), 1)
    assert (wide.token_table, wide.plan.token_table) == ("float32", 10 * 64 * 4)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_vllm_holds_the_table_of_a_float_checkpoint_twice_on_a_cpu(checkpoint: Checkpoint, dtype: str, size: int) -> None:
    asked = ServerSettings(checkpoint, dtype=dtype)
    launch = resolve(asked, CPU, Cpu(), 1)
    assert (launch.token_table, launch.plan.token_table) == (dtype, 2 * 10 * 64 * size)
    assert resolve(asked, L4, Cpu(), 1).plan.token_table == 10 * 64 * size


def test_glibc_keeps_freed_activations_on_a_cpu_unless_the_user_has_chosen(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), CPU, Cpu(), 1)
    chosen = environment(launch, {"MALLOC_TRIM_THRESHOLD_": "1"}, [0])
    assert int(chosen["MALLOC_MMAP_THRESHOLD_"]) == 32 * 2**20
    assert chosen["MALLOC_TRIM_THRESHOLD_"] == "1"


def test_an_int8_table_in_a_checkpoint_that_is_not_quantized_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="--token-table int8 goes with an INT4 checkpoint"):
        resolve(ServerSettings(checkpoint, token_table="int8"), CPU, Cpu(), 1)


def test_vllms_share_of_the_card_is_the_plans(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), L4, Cpu(), 1)
    share = float(told(launch, "--gpu-memory-utilization"))
    assert launch.plan.total < share * L4.memory < 1.2 * launch.plan.total  # type: ignore[operator]


def test_a_queue_that_would_refuse_a_lawful_batch_for_ever_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="--max-queue 99 is less than --max-client-batch 100"):
        resolve(ServerSettings(checkpoint, max_queue=99, max_client_batch=100), CPU, Cpu(), 1)
    launch = resolve(ServerSettings(checkpoint, max_queue=100, max_client_batch=100), CPU, Cpu(), 1)
    assert told(launch, "--max-num-queued-reqs") == "100"


def test_what_the_device_lacks_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="T4 has no 8-bit floats"):
        resolve(ServerSettings(checkpoint, kv_cache_dtype="fp8"), T4, Cpu(), 1)
    with pytest.raises(BadInput, match="T4 has no bfloat16"):
        resolve(ServerSettings(checkpoint, dtype="bfloat16"), T4, Cpu(), 1)
    with pytest.raises(BadInput, match=r"GTX 1080 has compute capability 6\.1"):
        resolve(ServerSettings(checkpoint), Target("cuda", "GTX 1080", 2**33, 2**33, 6.1), Cpu(), 1)


def test_an_fp8_cache_takes_half(checkpoint: Checkpoint) -> None:
    half = resolve(ServerSettings(checkpoint, kv_cache_dtype="fp8"), L4, Cpu(), 1)
    whole = resolve(ServerSettings(checkpoint), L4, Cpu(), 1)
    assert 2 * half.plan.kv_cache == whole.plan.kv_cache
    assert told(half, "--kv-cache-dtype") == "fp8"
    assert "--kv-cache-dtype" not in arguments(whole)


def test_a_device_that_is_too_small_is_told_with_the_plan(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), Target("cuda", "tiny card", 2**20, 2**20, 8.9), Cpu(), 1)
    with pytest.raises(
        BadInput, match=r"tiny card has 1 MiB free, and the plan needs 60\d MiB: weights .*, cache .*256 tokens"
    ):
        check_fits(launch)
    check_fits(resolve(ServerSettings(checkpoint), L4, Cpu(), 1))


def test_memory_chooses_lengths_and_what_is_given_stays(checkpoint: Checkpoint) -> None:
    roomy = resolve(ServerSettings(checkpoint, memory=2**30), L4, Cpu(), 1)
    assert (roomy.max_model_len, roomy.sizes.max_num_seqs) == (256, 256)
    assert roomy.plan.total <= 2**30
    kept = resolve(ServerSettings(checkpoint, memory=2**30, max_num_seqs=3, max_model_len=128), L4, Cpu(), 1)
    assert (kept.max_model_len, kept.sizes.max_num_seqs) == (128, 3)
    with pytest.raises(BadInput, match="--memory 1 MiB is too little: 1 sequence of 64 tokens need"):
        resolve(ServerSettings(checkpoint, memory=2**20), L4, Cpu(), 1)


def test_keys_are_neither_arguments_nor_environment_and_leave_as_hashes(checkpoint: Checkpoint) -> None:
    settings = ServerSettings(checkpoint, keys=("secret-one",))
    launch = resolve(settings, CPU, Cpu(), 1)
    env = environment(launch, {"QEMBED_API_KEY": "secret-one", "OPENAI_API_KEY": "secret-two"}, [0])
    for place in (str(arguments(launch)), str(env), repr(settings), repr(launch), rules(launch, "token", 0).dump().decode()):
        assert "secret" not in place
    assert len(rules(launch, "token", 0).keys) == 2
    assert rules(resolve(ServerSettings(checkpoint), CPU, Cpu(), 1), "token", 0).keys == []


def test_parallel_sizes_and_other_settings_are_passed_on(checkpoint: Checkpoint) -> None:
    asked = ServerSettings(
        checkpoint,
        tensor_parallel_size=2,
        data_parallel_size=3,
        engine_args=(("max-log-len", "5"), ("enable-request-id-headers", "true"), ("async-scheduling", "false")),
    )
    argv = arguments(resolve(asked, L4, Cpu(), 1))
    for words in (
        ["--tensor-parallel-size", "2"],
        ["--data-parallel-size", "3"],
        ["--max-log-len", "5"],
        ["--enable-request-id-headers"],
        ["--no-async-scheduling"],
    ):
        assert " ".join(words) in " ".join(argv)


def test_two_devices_share_the_matrices_and_the_cache(checkpoint: Checkpoint) -> None:
    one, two = (resolve(ServerSettings(checkpoint, tensor_parallel_size=size), L4, Cpu(), 1).plan for size in (1, 2))
    assert 2 * two.kv_cache == one.kv_cache
    assert 2 * two.token_table == one.token_table


def test_a_default_prompt_must_exist(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="--default-prompt 'questions': the model has document, query"):
        resolve(ServerSettings(checkpoint, default_prompt="questions"), CPU, Cpu(), 1)


def test_the_plan_in_metrics_is_for_one_of_the_devices(checkpoint: Checkpoint) -> None:
    assert rules(resolve(ServerSettings(checkpoint), CPU, Cpu(), 1), "token", 0).parts == 1
    several = ServerSettings(checkpoint, tensor_parallel_size=2, data_parallel_size=3)
    assert rules(resolve(several, L4, Cpu(), 1), "token", 0).parts == 6
