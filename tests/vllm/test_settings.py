"""Resolved settings, and vLLM's arguments, environment and rules for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.errors import BadInput
from qembed.vllm import kernels
from qembed.vllm.arguments import arguments, environment, rules, server_environment
from qembed.vllm.devices import PRESETS, Target
from qembed.vllm.kernels import Cpu
from qembed.vllm.prompt_models import prompt_models
from qembed.vllm.settings import Launch, ServerSettings, check_fits, resolve
from tests.checkpoints import write_placeholder
from tests.embedders import write_embedder
from tests.vllm.conftest import CONFIG

CPU, L4, T4 = Target("cpu", "CPU"), PRESETS["L4"], PRESETS["T4"]
WITH_BFLOAT16 = Cpu(frozenset({"avx512f", "avx512_bf16"}))


def value_of(launch: Launch, option: str) -> str:
    argv = arguments(launch)
    return argv[argv.index(option) + 1]


def test_limits_become_vllms_arguments(checkpoint: Checkpoint) -> None:
    settings = ServerSettings(
        checkpoint, max_num_seqs=7, max_num_batched_tokens=99, max_model_len=128, served_model_name="mine"
    )
    launch = resolve(settings, CPU, Cpu(), 1234)
    assert value_of(launch, "--max-num-seqs") == "7"
    assert value_of(launch, "--max-num-batched-tokens") == "128"
    assert value_of(launch, "--max-model-len") == "128"
    assert value_of(launch, "--served-model-name") == "mine"
    assert value_of(launch, "--port") == "1234"
    assert value_of(launch, "--kv-cache-memory-bytes") == str(launch.plan.kv_cache)


def test_without_a_cache_a_step_is_as_long_as_the_longest_text(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint, max_num_seqs=7, max_num_batched_tokens=99, max_model_len=200), CPU, Cpu(), 1)
    assert value_of(launch, "--max-num-batched-tokens") == "200"
    assert json.loads(value_of(launch, "--additional-config")) == {"qembed": {"step_tokens": 99, "causal": True}}
    assert value_of(launch, "--num-gpu-blocks-override") == str(launch.plan.kv_tokens // 32)
    assert value_of(launch, "--worker-cls") == "qembed.serve.vllm_plugin.cpu_worker.Worker"
    assert "--no-enable-chunked-prefill" in arguments(launch)
    on_gpu = resolve(ServerSettings(checkpoint), L4, Cpu(), 1)
    assert value_of(on_gpu, "--worker-cls") == "qembed.serve.vllm_plugin.gpu_worker.Worker"


@pytest.mark.parametrize(("length", "reads_whole"), [(99, True), (100, False)])
def test_with_a_cache_chunked_prefill_is_off_if_the_longest_text_fits_into_a_step(
    checkpoint: Checkpoint, length: int, reads_whole: bool
) -> None:
    settings = ServerSettings(checkpoint, max_num_seqs=7, max_num_batched_tokens=99, max_model_len=length, kv_cache=True)
    launch = resolve(settings, CPU, Cpu(), 1)
    assert value_of(launch, "--max-num-batched-tokens") == "99"
    assert ("--no-enable-chunked-prefill" in arguments(launch)) is reads_whole
    assert not {"--worker-cls", "--scheduler-cls"} & set(arguments(launch))


@pytest.mark.parametrize(
    "engine_arg", [("enable-prefix-caching", "true"), ("enable_chunked_prefill", "true"), ("pipeline-parallel-size", "2")]
)
def test_a_setting_of_vllm_that_needs_a_cache_brings_it(checkpoint: Checkpoint, engine_arg: tuple[str, str]) -> None:
    assert resolve(ServerSettings(checkpoint, engine_args=(engine_arg,)), CPU, Cpu(), 1).keeps_cache
    assert not resolve(ServerSettings(checkpoint, engine_args=(("max-log-len", "5"),)), CPU, Cpu(), 1).keeps_cache


def test_the_default_context_is_halved_until_it_fits(tmp_path: Path) -> None:
    long = write_placeholder(tmp_path / "long", {**CONFIG, "max_position_embeddings": 32768})
    whole = resolve(ServerSettings(long), CPU, Cpu(), 1)
    assert whole.max_model_len == 32768
    tight = Target("cpu", "CPU", whole.plan.total - 1, whole.plan.total - 1)
    assert resolve(ServerSettings(long), tight, Cpu(), 1).max_model_len == 16384
    assert resolve(ServerSettings(long, max_model_len=32768), tight, Cpu(), 1).max_model_len == 32768
    tiny = Target("cpu", "CPU", 2**20, 2**20)
    assert resolve(ServerSettings(long), tiny, Cpu(), 1).max_model_len == 2048


def test_defaults_come_from_checkpoint_and_machine(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), L4, Cpu(), 8000)
    assert value_of(launch, "--max-model-len") == "256"
    assert value_of(launch, "--max-num-seqs") == "32"
    assert value_of(launch, "--max-num-batched-tokens") == "2048"
    assert value_of(launch, "--dtype") == "bfloat16"
    assert value_of(launch, "--served-model-name") == "tiny"
    assert launch.url == "http://127.0.0.1:8000/v1"
    assert json.loads(value_of(launch, "--hf-overrides")) == {
        "is_matryoshka": True,
        "matryoshka_dimensions": None,
        "max_position_embeddings": 256,
    }


def test_remote_code_is_never_trusted_and_only_safetensors_are_read(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), CPU, Cpu(), 1)
    assert "--trust-remote-code" not in arguments(launch)
    assert value_of(launch, "--load-format") == "safetensors"


def test_sizes_beyond_the_model_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="256 positions"):
        resolve(ServerSettings(checkpoint, max_model_len=257), CPU, Cpu(), 1)
    with pytest.raises(BadInput, match="--max-num-batched-tokens 31"):
        resolve(ServerSettings(checkpoint, max_num_batched_tokens=31, max_num_seqs=32), CPU, Cpu(), 1)


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("box", "box")])
def test_the_url_works_for_a_client_on_this_machine(checkpoint: Checkpoint, host: str, url: str) -> None:
    assert resolve(ServerSettings(checkpoint, host=host), CPU, Cpu(), 80).url == f"http://{url}:80/v1"


def test_a_cpu_gets_its_cores_and_the_planned_cache(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), CPU, WITH_BFLOAT16, 1)
    env = environment(launch, {"VLLM_CPU_KVCACHE_SPACE": "40", "HOME": "/h"}, [0, 2])
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0,2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in env
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == "1"
    assert env["HOME"] == "/h"
    assert environment(launch, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, [0])["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_on_a_cpu_one_engine_is_forked_with_its_number_of_threads(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), CPU, Cpu(), 1)
    env = server_environment(launch, {}, [0, 2])
    assert (env["VLLM_ENABLE_V1_MULTIPROCESSING"], env["OMP_NUM_THREADS"], env["QEMBED_THREADS"]) == ("0", "1", "2")
    assert server_environment(launch, {"OMP_NUM_THREADS": "7"}, [0, 2])["QEMBED_THREADS"] == "7"
    for other in (
        resolve(ServerSettings(checkpoint, data_parallel_size=2), CPU, Cpu(), 1),
        resolve(ServerSettings(checkpoint, kv_cache=True), CPU, Cpu(), 1),
        resolve(ServerSettings(checkpoint), L4, Cpu(), 1),
    ):
        assert "QEMBED_THREADS" not in server_environment(other, {}, [0, 2])


@pytest.mark.parametrize(("cores", "binding"), [([0, 1, 2, 3], "0,2|1,3"), ([4], "4|4"), ([0, 1, 2], "0,2|1")])
def test_parallel_cpu_workers_have_their_own_cores(checkpoint: Checkpoint, cores: list[int], binding: str) -> None:
    for size in ({"tensor_parallel_size": 2}, {"data_parallel_size": 2}):
        launch = resolve(ServerSettings(checkpoint, **size), CPU, Cpu(), 1)
        assert environment(launch, {}, cores)["VLLM_CPU_OMP_THREADS_BIND"] == binding


@pytest.mark.parametrize(
    ("threads", "workers", "binding", "each"),
    [(1, 1, "0", "1"), (3, 1, "nobind", "3"), (2, 2, "0|2", "1"), (1, 2, "nobind", "1"), (5, 2, "nobind", "2")],
)
def test_threads_are_those_of_all_workers_whatever_the_environment_says(
    checkpoint: Checkpoint, threads: int, workers: int, binding: str, each: str
) -> None:
    launch = resolve(ServerSettings(checkpoint, threads=threads, tensor_parallel_size=workers), CPU, Cpu(), 1)
    env = environment(launch, {"OMP_NUM_THREADS": "7", "VLLM_CPU_OMP_THREADS_BIND": "auto"}, [0, 2])
    assert (env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == (binding, each)


def test_a_forked_engine_computes_with_the_chosen_threads(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint, threads=1), CPU, Cpu(), 1)
    assert server_environment(launch, {"OMP_NUM_THREADS": "7"}, [0, 2])["QEMBED_THREADS"] == "1"


def test_choosing_the_plugins_kernel_disables_vllms(checkpoint: Checkpoint, int4: Checkpoint) -> None:
    launch = resolve(ServerSettings(int4), CPU, Cpu(), 1)
    assert launch.choice.kernel == "qembed-torch"
    assert environment(launch, {"VLLM_DISABLED_KERNELS": "Other"}, [0])["VLLM_DISABLED_KERNELS"] == "Other,CPUWNA16LinearKernel"
    for other in (
        resolve(ServerSettings(int4), CPU, Cpu(kernels.AMX), 1),
        replace(launch, target=L4),
        resolve(ServerSettings(checkpoint), CPU, Cpu(), 1),
    ):
        assert "VLLM_DISABLED_KERNELS" not in environment(other, {}, [0])


def test_the_plugin_converts_a_table_to_int8_only_if_it_is_not_yet(int4: Checkpoint, int8_table: Checkpoint) -> None:
    converted = resolve(ServerSettings(int4, token_table="int8"), CPU, Cpu(), 1)
    overrides = json.loads(value_of(converted, "--hf-overrides"))
    assert overrides["quantization_config"] == {
        "quant_method": "qembed_awq",
        "bits": 4,
        "group_size": 32,
        "token_table": "int8",
    }
    stored = resolve(ServerSettings(int8_table, token_table="int8"), CPU, Cpu(), 1)
    untouched = resolve(ServerSettings(int4), CPU, Cpu(), 1)
    for launch in (stored, untouched):
        assert "quantization_config" not in json.loads(value_of(launch, "--hf-overrides"))
    assert [launch.token_table for launch in (converted, stored, untouched)] == ["int8", "int8", "float16"]
    assert environment(stored, {}, [0])["VLLM_DISABLED_KERNELS"] == "CPUWNA16LinearKernel"


def test_an_int8_table_is_planned_in_int8(int4: Checkpoint) -> None:
    assert resolve(ServerSettings(int4, token_table="int8"), CPU, Cpu(), 1).plan.token_table == 10 * 64 + 10 * 4 + 64 * 4


def test_with_int4_on_a_cpu_a_float16_table_stays_float16(int4: Checkpoint) -> None:
    on_cpu = resolve(ServerSettings(int4), CPU, Cpu(), 1)
    assert (on_cpu.token_table, on_cpu.plan.token_table) == ("float16", 10 * 64 * 2)
    on_gpu = resolve(ServerSettings(int4), T4, Cpu(), 1)
    assert (on_gpu.token_table, on_gpu.plan.token_table) == ("float16", 10 * 64 * 2)
    wide = resolve(ServerSettings(int4, dtype="float32"), L4, Cpu(), 1)
    assert (wide.token_table, wide.plan.token_table) == ("float32", 10 * 64 * 4)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_on_a_cpu_vllm_holds_a_float_checkpoints_table_twice(checkpoint: Checkpoint, dtype: str, size: int) -> None:
    settings = ServerSettings(checkpoint, dtype=dtype)
    launch = resolve(settings, CPU, Cpu(), 1)
    assert (launch.token_table, launch.plan.token_table) == (dtype, 2 * 10 * 64 * size)
    assert resolve(settings, L4, Cpu(), 1).plan.token_table == 10 * 64 * size


def test_malloc_thresholds_on_a_cpu_yield_to_the_users(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), CPU, Cpu(), 1)
    variables = environment(launch, {"MALLOC_TRIM_THRESHOLD_": "1"}, [0])
    assert int(variables["MALLOC_MMAP_THRESHOLD_"]) == 32 * 2**20
    assert variables["MALLOC_TRIM_THRESHOLD_"] == "1"


def test_an_int8_table_needs_a_quantized_checkpoint(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="--token-table int8 goes with an INT4 checkpoint"):
        resolve(ServerSettings(checkpoint, token_table="int8"), CPU, Cpu(), 1)


def test_gpu_memory_utilization_follows_the_plan(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), L4, Cpu(), 1)
    share = float(value_of(launch, "--gpu-memory-utilization"))
    assert launch.plan.total < share * L4.memory < 1.2 * launch.plan.total  # type: ignore[operator]


def test_a_queue_smaller_than_a_batch_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="--max-queue 99 is less than --max-client-batch 100"):
        resolve(ServerSettings(checkpoint, max_queue=99, max_client_batch=100), CPU, Cpu(), 1)
    launch = resolve(ServerSettings(checkpoint, max_queue=100, max_client_batch=100), CPU, Cpu(), 1)
    assert value_of(launch, "--max-num-queued-reqs") == "100"


def test_features_that_the_device_lacks_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="T4 has no 8-bit floats"):
        resolve(ServerSettings(checkpoint, kv_cache_dtype="fp8"), T4, Cpu(), 1)
    with pytest.raises(BadInput, match="T4 has no bfloat16"):
        resolve(ServerSettings(checkpoint, dtype="bfloat16"), T4, Cpu(), 1)
    with pytest.raises(BadInput, match=r"GTX 1080 has compute capability 6\.1"):
        resolve(ServerSettings(checkpoint), Target("cuda", "GTX 1080", 2**33, 2**33, 6.1), Cpu(), 1)


@pytest.mark.parametrize(("capability", "dtype"), [(7.5, "float16"), (8.0, "bfloat16"), (9.0, "bfloat16"), (None, "bfloat16")])
def test_a_gpu_computes_in_bfloat16_if_it_has_it(checkpoint: Checkpoint, capability: float | None, dtype: str) -> None:
    card = Target("cuda", "card", 2**33, 2**33, capability)
    assert resolve(ServerSettings(checkpoint), card, Cpu(), 1).dtype == dtype
    assert resolve(ServerSettings(checkpoint, dtype="float16"), card, Cpu(), 1).dtype == "float16"


def test_a_checkpoint_that_overflows_float16_is_refused_in_it_with_the_reason(int4: Checkpoint) -> None:
    reason = "the residual stream reaches 71,230 in layer 1"
    (int4.folder / "qembed.json").write_text(json.dumps({"float16": {"overflows": [reason]}}))
    in_float16 = ServerSettings(int4, dtype="float16")
    for target in (CPU, L4):
        with pytest.raises(BadInput, match=f"{reason}; use --dtype bfloat16"):
            resolve(in_float16, target, Cpu(), 1)
    with pytest.raises(BadInput, match=f"{reason}; T4 has no bfloat16: use a GPU of compute capability 8 or later, or a CPU"):
        resolve(ServerSettings(int4), T4, Cpu(), 1)
    assert resolve(ServerSettings(int4), L4, Cpu(), 1).dtype == "bfloat16"
    assert resolve(ServerSettings(int4), CPU, Cpu(), 1).dtype == "float32"


@pytest.mark.parametrize("field", [None, [], "x", {}, {"overflows": "x"}, {"overflows": []}, {"overflows": [5, None]}])
def test_a_manifest_that_knows_of_no_overflow_allows_float16(int4: Checkpoint, field: object) -> None:
    (int4.folder / "qembed.json").write_text(json.dumps({"float16": field}))
    assert resolve(ServerSettings(int4), T4, Cpu(), 1).dtype == "float16"


def test_an_fp8_cache_takes_half_the_memory(checkpoint: Checkpoint) -> None:
    half = resolve(ServerSettings(checkpoint, kv_cache_dtype="fp8"), L4, Cpu(), 1)
    full = resolve(ServerSettings(checkpoint), L4, Cpu(), 1)
    assert 2 * half.plan.kv_cache == full.plan.kv_cache
    assert value_of(half, "--kv-cache-dtype") == "fp8"
    assert value_of(half, "--attention-backend") == "TRITON_ATTN"
    assert "--attention-backend" not in arguments(resolve(ServerSettings(checkpoint), L4, Cpu(), 1))
    assert "--kv-cache-dtype" not in arguments(full)


def test_a_device_that_is_too_small_is_refused_with_the_plan(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint), Target("cuda", "tiny card", 2**20, 2**20, 8.9), Cpu(), 1)
    with pytest.raises(
        BadInput, match=r"tiny card has 1 MiB free, and the plan needs 60\d MiB: weights .*, keys and values .*256 tokens"
    ):
        check_fits(launch)
    check_fits(resolve(ServerSettings(checkpoint), L4, Cpu(), 1))


def test_memory_chooses_sizes_and_given_ones_stay(checkpoint: Checkpoint) -> None:
    roomy = resolve(ServerSettings(checkpoint, memory=2**30), L4, Cpu(), 1)
    assert (roomy.max_model_len, roomy.sizes.max_num_seqs) == (256, 256)
    assert roomy.plan.total <= 2**30
    fixed = resolve(ServerSettings(checkpoint, memory=2**30, max_num_seqs=3, max_model_len=128), L4, Cpu(), 1)
    assert (fixed.max_model_len, fixed.sizes.max_num_seqs) == (128, 3)
    with pytest.raises(BadInput, match="--memory 1 MiB is too little: 1 sequence of 64 tokens need"):
        resolve(ServerSettings(checkpoint, memory=2**20), L4, Cpu(), 1)


def test_keys_are_passed_only_as_hashes(checkpoint: Checkpoint) -> None:
    settings = ServerSettings(checkpoint, keys={"secret-one": "mine"})
    launch = resolve(settings, CPU, Cpu(), 1)
    env = environment(launch, {"QEMBED_API_KEY": "secret-one", "OPENAI_API_KEY": "secret-two"}, [0])
    for text in (str(arguments(launch)), str(env), repr(settings), repr(launch), rules(launch, "token", 0).dump().decode()):
        assert "secret" not in text
    assert sorted(rules(launch, "token", 0).keys.values(), key=str) == [None, "mine"]
    assert rules(resolve(ServerSettings(checkpoint), CPU, Cpu(), 1), "token", 0).keys == {}


def test_gloo_listens_on_the_loopback_interface_of_a_single_machine(checkpoint: Checkpoint) -> None:
    def interface(inherited: dict[str, str], *engine_args: tuple[str, str]) -> str | None:
        launch = resolve(ServerSettings(checkpoint, engine_args=engine_args), CPU, Cpu(), 1)
        return environment(launch, inherited, [0]).get("GLOO_SOCKET_IFNAME")

    assert interface({}) == "lo"
    assert interface({"GLOO_SOCKET_IFNAME": "eth0"}) == "eth0"
    assert interface({}, ("nnodes", "2")) is None


def test_vllm_on_a_gpu_needs_no_flashinfer(checkpoint: Checkpoint) -> None:
    def sampler(target: Target, inherited: dict[str, str]) -> str | None:
        return environment(resolve(ServerSettings(checkpoint), target, Cpu(), 1), inherited, [0]).get(
            "VLLM_USE_FLASHINFER_SAMPLER"
        )

    assert sampler(L4, {}) == "0"
    assert sampler(L4, {"VLLM_USE_FLASHINFER_SAMPLER": "1"}) == "1"
    assert sampler(CPU, {}) is None


def test_parallel_sizes_and_engine_args_become_arguments(checkpoint: Checkpoint) -> None:
    settings = ServerSettings(
        checkpoint,
        tensor_parallel_size=2,
        data_parallel_size=3,
        engine_args=(("max-log-len", "5"), ("enable-request-id-headers", "true"), ("async-scheduling", "false")),
    )
    argv = arguments(resolve(settings, L4, Cpu(), 1))
    for words in (
        ["--tensor-parallel-size", "2"],
        ["--data-parallel-size", "3"],
        ["--max-log-len", "5"],
        ["--enable-request-id-headers"],
        ["--no-async-scheduling"],
    ):
        assert " ".join(words) in " ".join(argv)


def test_two_devices_share_the_matrices_and_the_cache(checkpoint: Checkpoint) -> None:
    single, parallel = (resolve(ServerSettings(checkpoint, tensor_parallel_size=size), L4, Cpu(), 1).plan for size in (1, 2))
    assert 2 * parallel.kv_cache == single.kv_cache
    assert 2 * parallel.token_table == single.token_table


def test_a_default_prompt_must_exist(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadInput, match="--default-prompt 'questions': the model has document, query"):
        resolve(ServerSettings(checkpoint, default_prompt="questions"), CPU, Cpu(), 1)


def test_the_plan_in_metrics_is_for_one_of_the_devices(checkpoint: Checkpoint) -> None:
    assert rules(resolve(ServerSettings(checkpoint), CPU, Cpu(), 1), "token", 0).parts == 1
    several = ServerSettings(checkpoint, tensor_parallel_size=2, data_parallel_size=3)
    assert rules(resolve(several, L4, Cpu(), 1), "token", 0).parts == 6


def test_the_model_has_a_further_name_for_each_prompt_unless_switched_off(checkpoint: Checkpoint) -> None:
    launch = resolve(ServerSettings(checkpoint, served_model_name="m"), CPU, Cpu(), 1)
    start = arguments(launch).index("--served-model-name")
    assert arguments(launch)[start + 1 : start + 5] == ["m", "m-query", "m-document", "--host"]
    assert rules(launch, "token", 0).prompt_models == {"m-query": "query", "m-document": "document"}
    launch = resolve(ServerSettings(checkpoint, served_model_name="m", prompt_names=False), CPU, Cpu(), 1)
    assert arguments(launch)[start + 1 : start + 3] == ["m", "--host"]
    assert rules(launch, "token", 0).prompt_models == {}


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gate_knows_whether_vectors_have_unit_length(tmp_path: Path, normalize: bool) -> None:
    checkpoint = write_embedder(tmp_path / "model", normalize=normalize)
    assert rules(resolve(ServerSettings(checkpoint), CPU, Cpu(), 1), "token", 0).normalized is normalize
    assert rules(resolve(ServerSettings(checkpoint, normalize=True), CPU, Cpu(), 1), "token", 0).normalized


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00b", "x" * 129])
def test_a_prompt_whose_name_cannot_be_part_of_a_models_gives_it_none(checkpoint: Checkpoint, name: str) -> None:
    file = checkpoint.folder / "config_sentence_transformers.json"
    file.write_text(json.dumps({"prompts": {name: "p: ", "Retrieval-query": "q: "}}))
    names = set(prompt_models(ServerSettings(find(str(checkpoint.folder)), served_model_name="m")))
    assert names == {"m-query", "m-document", "m-Retrieval-query"}
