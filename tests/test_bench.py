"""The bench for GPUs where there is none: what its script does with steps, transfers and sections."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qembed.checkpoint.find import SAMPLE, find

BENCH = Path(__file__).parents[1] / "bench"
WHERE = {
    "rehearsal": False,
    "device": "cuda",
    "name": "T4",
    "memory": 15 * 2**30,
    "capability": 7.5,
    "driver": "580",
    "versions": {},
}
SPEED = {"tokens_per_second": 1234.0, "p50": 0.01, "p99": 0.02}
PLAN = {"token_table": 2**28, "linear": 2**28, "other": 0, "kv_cache": 0, "activations": 0, "graphs": 2**27, "runtime": 2**29}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_without_a_gpu_the_script_says_so_and_leaves_the_results_alone(tmp_path: Path) -> None:
    run = ["bash", str(BENCH / "gpu.sh"), "run", "quantize", "--results", str(tmp_path / "results")]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True, env=environment())
    assert result.stdout == "bench-gpu: skipped: no NVIDIA GPU\n"
    assert not (tmp_path / "results").exists()


def test_an_unknown_piece_is_refused() -> None:
    run = ["bash", str(BENCH / "gpu.sh"), "run", "servw", "--device", "cpu"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False, env=environment())
    assert result.returncode == 2
    assert "servw" in result.stderr


def environment() -> dict[str, str]:
    return {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}


class Clock:
    """Seconds that pass only when a step takes them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def step(self, module: ModuleType, name: str, least: float, takes: float, calls: list[str], error: str = "") -> Any:
        def measure(_: Any) -> Mapping[str, Any]:
            calls.append(name)
            self.now += takes
            if error:
                raise ValueError(error)
            return {"passed": 3}

        return module.Step(name, least, measure)


def test_steps_run_while_time_is_left_and_go_on_where_they_stopped(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    steps, clock, calls = bench("gpu_steps"), Clock(), list[str]()
    file, setup = tmp_path / "results" / "quantize.json", steps.Setup("cpu", tmp_path)
    todo = [clock.step(steps, name, 50, 60, calls) for name in ("first", "second", "third")]
    record = steps.run(todo, file, setup, WHERE, 130, clock)
    assert calls == ["first", "second"]  # 10 seconds are left: too few for the third
    assert json.loads(file.read_text()) == record
    assert record["steps"]["second"] == {"passed": 3, "seconds_taken": 60}
    steps.run(todo, file, setup, WHERE, 130, clock)
    assert calls == ["first", "second", "third"]


def test_what_a_cut_off_piece_measured_is_stored(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    steps, clock, calls = bench("gpu_steps"), Clock(), list[str]()

    def interrupted(_: Any) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    todo = [clock.step(steps, "tests", 1, 1, calls), steps.Step("second", 1, interrupted)]
    file = tmp_path / "quantize.json"
    with pytest.raises(KeyboardInterrupt):
        steps.run(todo, file, steps.Setup("cpu", tmp_path), WHERE, 100, clock)
    assert list(json.loads(file.read_text())["steps"]) == ["tests"]
    assert "Tests: 3 passed." in file.with_suffix(".md").read_text()


def test_a_step_that_failed_is_reported_and_repeated(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    steps, clock, calls = bench("gpu_steps"), Clock(), list[str]()
    file, setup = tmp_path / "quantize.json", steps.Setup("cpu", tmp_path)
    todo = [clock.step(steps, "first", 1, 1, calls, "no kernel"), clock.step(steps, "second", 1, 1, calls)]
    record = steps.run(todo, file, setup, WHERE, 100, clock)
    assert record["steps"]["first"]["error"] == "ValueError: no kernel"
    assert "first: failed: ValueError: no kernel" in file.with_suffix(".md").read_text()
    steps.run(todo, file, setup, WHERE, 100, clock)
    assert calls == ["first", "second", "first"]


def test_only_the_steps_named_are_run(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    steps, clock, calls = bench("gpu_steps"), Clock(), list[str]()
    file, setup = tmp_path / "quantize.json", steps.Setup("cpu", tmp_path)
    todo = [clock.step(steps, name, 1, 1, calls) for name in ("first", "second", "third")]
    steps.run(todo, file, setup, WHERE, 100, clock, only=["third"])
    steps.run(todo, file, setup, WHERE, 100, clock, only=["first"])
    assert calls == ["third", "first"]
    assert list(json.loads(file.read_text())["steps"]) == ["first", "third"]


def test_numbers_of_another_machine_are_put_aside(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    steps, clock, calls = bench("gpu_steps"), Clock(), list[str]()
    file, setup = tmp_path / "quantize.json", steps.Setup("cpu", tmp_path)
    todo = [clock.step(steps, "first", 1, 1, calls)]
    date = steps.run(todo, file, setup, WHERE, 100, clock)["date"]
    steps.run(todo, file, setup, {**WHERE, "name": "L4"}, 100, clock)
    assert calls == ["first", "first"]
    assert json.loads((tmp_path / f"quantize-{date}.json").read_text())["where"]["name"] == "T4"
    assert json.loads(file.read_text())["where"]["name"] == "L4"


def test_merging_replaces_sections_and_leaves_rehearsals_out(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    gpu, file = bench("gpu"), tmp_path / "RESULTS.md"
    record = {"where": WHERE, "date": "2026-11-27", "steps": {"tests": {"passed": 3}}}
    rehearsal = {**record, "where": {**WHERE, "rehearsal": True}}
    (tmp_path / "quantize.json").write_text(json.dumps(record))
    (tmp_path / "serve.json").write_text(json.dumps(rehearsal))
    assert gpu.merge(tmp_path, file) == ["quantize"]
    (tmp_path / "quantize.json").write_text(json.dumps({**record, "steps": {"tests": {"passed": 4}}}))
    gpu.merge(tmp_path, file)
    assert file.read_text().count("## Quantizing on a GPU") == 1
    assert "Tests: 4 passed." in file.read_text()


@pytest.mark.parametrize("tokens", [43, 512, 2048])
def test_texts_have_exactly_the_requested_number_of_tokens(bench: Callable[[str], ModuleType], tokens: int) -> None:
    from qembed.checkpoint.find import SAMPLE, find

    tokenizer = find(SAMPLE).tokenizer()
    text = bench("gpu_serve").text_of(tokens, lambda text: len(tokenizer.encode(text).ids))
    assert len(tokenizer.encode(text).ids) == tokens


def test_the_section_of_serving_has_memory_by_line_and_the_target(bench: Callable[[str], ModuleType]) -> None:
    server = {
        "context": 2048, "planned": 2**30, "used": int(1.5 * 2**30), "plan": PLAN,
        "loaded": {"dtype": "float16", "kernel": "MarlinLinearKernel"},
        "log": {"weights": 2**29, "graphs": 2**26}, "speeds": {"256x2048": SPEED},
    }  # fmt: skip
    record = {"where": WHERE, "date": "2026-11-27", "steps": {"int4": server, "fp16": {**server, "used": 3 * 2**30}}}
    section = bench("gpu_report").section("serve", record)
    cells = "2,048 | 1.00 GiB | 1.50 GiB | 0.50 GiB | 0.50 GiB | 0.12 GiB | 0.06 GiB | float16 | MarlinLinearKernel"
    assert f"| int4 | {cells} |" in section
    assert "Target for INT4, at most 1.60 GiB in all: met (1.50 GiB)" in section
    assert "| 256 of 2048 tokens | 1,234 | 10.0 | 20.0 | 1,234 | 10.0 | 20.0 |" in section


def test_agreement_counts_integers_and_scales(tmp_path: Path, bench: Callable[[str], ModuleType], int4: Path) -> None:
    from safetensors.torch import load_file, save_file

    compare = bench("gpu_quantize").agreement
    assert set(compare(int4, int4).values()) == {1.0}
    other = tmp_path / "other"
    shutil.copytree(int4, other)
    shard = next(path for path in sorted(other.glob("*.safetensors")) if any(".qweight" in name for name in load_file(path)))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(".qweight"))
    tensors[name][0, 0] ^= 1  # one of the eight integers in this word
    save_file(tensors, shard, metadata={"format": "pt"})
    agreement = compare(int4, other)
    assert (agreement["scales"], agreement["layers"] < 1) == (1.0, True)
    assert 0.999 < agreement["integers"] == agreement["integers_where_scales_agree"] < 1


LOG = """
INFO 11-27 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='m', dtype=torch.float16, max_seq_len=512,
quantization=qembed_awq, enforce_eager=True, kv_cache_dtype=fp8, device_config=cuda, seed=0
INFO 11-27 [__init__.py:923] Using MarlinLinearKernel for mixed-precision linear
INFO 11-27 [cuda.py:483] Using TRITON_ATTN attention backend out of potential backends: ['TRITON_ATTN'].
"""


def test_the_log_tells_what_the_engine_loaded(bench: Callable[[str], ModuleType]) -> None:
    assert bench("gpu_variants").loaded(LOG) == {
        "dtype": "float16",
        "quantization": "qembed_awq",
        "cache": "fp8",
        "kernel": "MarlinLinearKernel",
        "attention": "TRITON_ATTN",
    }


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("int4 by Marlin", {"kernel": "MacheteLinearKernel"}),
        ("fp16", {"quantization": "awq"}),
        ("int4, float16", {"dtype": "bfloat16"}),
        ("int4, INT8 table", {"quantization": "awq"}),
        ("int4, fp8 keys and values", {"cache": "auto"}),
        ("int4, fp8 keys and values", {}),
    ],
)
def test_a_variant_whose_option_has_no_effect_fails(
    bench: Callable[[str], ModuleType], name: str, engine: Mapping[str, str]
) -> None:
    variants = bench("gpu_variants")
    (expected,) = variants.VARIANTS[name].loaded.items()
    with pytest.raises(ValueError, match=f"{name}: .*{expected[1]}"):
        variants.check(name, variants.VARIANTS[name], engine)
    variants.check(name, variants.VARIANTS[name], dict([expected]))


def test_a_rehearsal_has_the_options_that_a_cpu_has(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    from qembed.vllm.kernels import Cpu

    variants, steps = bench("gpu_variants"), bench("gpu_steps")
    cpu, cuda = steps.Setup("cpu", tmp_path), steps.Setup("cuda", tmp_path)
    assert variants.on(cpu, "int4, float16").options == ("--dtype", "float16")
    assert variants.on(cpu, "int4, INT8 table").options == ("--token-table", "int8")
    with pytest.raises(steps.LeftOut, match="fp8"):
        variants.on(cpu, "int4, fp8 keys and values")
    both = Cpu(frozenset({"avx2", "fma", "f16c", "avx512f", "avx512_bf16"}), compiled=True)
    assert variants.on(cpu, "int4 by Marlin", lambda: both).loaded == {"kernel": "CPUWNA16LinearKernel"}
    with pytest.raises(steps.LeftOut, match="kernel"):
        variants.on(cpu, "int4 by Marlin", lambda: Cpu(frozenset({"avx2", "fma", "f16c"}), compiled=True))
    assert variants.on(cuda, "int4 by Marlin").loaded == {"kernel": "MarlinLinearKernel"}
    assert variants.on(cuda, "int4, fp8 keys and values").options == ("--kv-cache-dtype", "fp8")


def test_a_step_that_is_left_out_says_why_and_does_not_count_as_a_failure(
    tmp_path: Path, bench: Callable[[str], ModuleType]
) -> None:
    steps, calls = bench("gpu_steps"), list[str]()

    def measure(_: Any) -> Mapping[str, Any]:
        calls.append("fp8")
        raise steps.LeftOut("a CPU has no fp8")

    file, setup = tmp_path / "fidelity.json", steps.Setup("cpu", tmp_path)
    for _ in range(2):
        record = steps.run([steps.Step("fp8", 1, measure)], file, setup, WHERE, 100, Clock())
    assert calls == ["fp8"]
    assert "error" not in record["steps"]["fp8"]
    assert "fp8: left out: a CPU has no fp8" in file.with_suffix(".md").read_text()


def test_the_section_of_vectors_has_what_vllm_loaded(bench: Callable[[str], ModuleType]) -> None:
    step = {
        "loaded": bench("gpu_variants").loaded(LOG), "texts": 9, "lowest": 0.99991, "lowest_of_the_longest": 0.99992,
        "mean_distance": 8e-5, "alone_or_together": 1.0,
    }  # fmt: skip
    record = {"where": WHERE, "date": "2026-11-27", "steps": {"int4, INT8 table": step}}
    section = bench("gpu_report").section("fidelity", record)
    assert "| int4, INT8 table | float16 | qembed_awq | fp8 | MarlinLinearKernel | 9 | 0.99991 | 0.99992 |" in section


def test_the_section_of_two_models_has_the_speed_of_both(bench: Callable[[str], ModuleType]) -> None:
    step = {
        "limit": 4 * 2**30, "planned": 3 * 2**30, "used": 2 * 2**30, "context": [2048, 1024],
        "alone": {"8x43": {"tokens_per_second": 900.0}}, "beside": {"8x43": {"tokens_per_second": 500.0}},
        "pairs_per_second": {"alone": 80.0, "beside": 40.0},
    }  # fmt: skip
    record = {"where": WHERE, "date": "2026-11-28", "steps": {"pair": step}}
    section = bench("gpu_report").section("together", record)
    assert "planned 3.00 GiB, used 2.00 GiB, within 4.00 GiB" in section
    assert "8 of 43 tokens: 900 tokens/s alone, 500 beside" in section
    assert "80 pairs/s alone, 40 beside" in section


@pytest.mark.slow
def test_a_random_reranker_is_one_for_qembed_and_for_transformers(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "random-reranker"
    vocabulary = find(SAMPLE).tokenizer().get_vocab_size() + 2
    bench("random_checkpoint").write("0.6B", folder, 1, vocabulary=vocabulary, reranker=True)
    description = find(str(folder)).reranker
    assert description is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tuple(tokenizer.convert_tokens_to_ids(["no", "yes"])) == description.answers
    assert tokenizer("a").input_ids[-1] != tokenizer.convert_tokens_to_ids("<|endoftext|>")
