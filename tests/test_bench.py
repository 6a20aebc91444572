"""The bench for GPUs where there is none: what its script does with steps, transfers and sections."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


@pytest.fixture
def wheels(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("gpu_wheels")


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
        "context": 2048, "planned": 2**30, "used": int(1.5 * 2**30), "plan": PLAN, "dtype": "float16",
        "kernel": "MarlinLinearKernel", "log": {"weights": 2**29, "graphs": 2**26}, "speeds": {"256x2048": SPEED},
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


@pytest.mark.parametrize("size", [1, 7, 100, 101])
def test_parts_are_cut_to_size_and_joined_again(tmp_path: Path, wheels: ModuleType, size: int) -> None:
    data = bytes(range(100))
    parts = wheels.cut([data[:13], data[13:50], data[50:]], size, tmp_path)
    assert [part["bytes"] for part in parts] == [size] * (100 // size) + [100 % size] * bool(100 % size)
    assert b"".join((tmp_path / part["name"]).read_bytes() for part in parts) == data


def test_a_tree_that_fills_the_limit_leaves_no_room(tmp_path: Path, wheels: ModuleType) -> None:
    with pytest.raises(ValueError, match="limit"):
        wheels.cut([b"data"], 0, tmp_path)


def repository(folder: Path, tree_bytes: int) -> None:
    """A repository with a file of so many bytes, an ignored one, and wheels as they are fetched."""
    folder.mkdir()
    (folder / "qembed").mkdir()
    (folder / "file").write_bytes(b"x" * tree_bytes)
    (folder / ".gitignore").write_text("build/\nignored\n")
    (folder / "ignored").write_bytes(b"x" * 10**6)
    shutil.copyfile(BENCH.parent / "pyproject.toml", folder / "pyproject.toml")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def wheel_folder(folder: Path) -> None:
    (folder / "deps").mkdir(parents=True)
    (folder / "vllm").mkdir()
    make_wheel(folder / "deps" / "small-1-py3-none-any.whl", {"small.py": b"value = 1\n"})
    whole = folder / "vllm-1-py3-none-any.whl"
    members = {"vllm/__init__.py": b"", "vllm/_moe_C_stable_libtorch.abi3.so": bytes(range(256)) * 40}
    make_wheel(whole, members)
    data = whole.read_bytes()
    for number, begin in enumerate(range(0, len(data), 2000)):
        (folder / "vllm" / f"part-{number:02d}").write_bytes(data[begin : begin + 2000])
    (folder / "vllm" / "name").write_text(f"{whole.name}\n")


def make_wheel(path: Path, members: Mapping[str, bytes]) -> None:
    name = path.name.split("-")[0]
    info = f"{name}-1.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(path, "w") as wheel:
        for file, data in files.items():
            wheel.writestr(file, data)


def test_every_trip_is_within_the_limit_and_the_other_side_gets_the_wheels(tmp_path: Path, wheels: ModuleType) -> None:
    here, there, tree_bytes = tmp_path / "here", tmp_path / "there", 20_000
    repository(here, tree_bytes)
    wheel_folder(tmp_path / "wheels")
    parts = wheels.pack(tmp_path / "wheels", everything=True, limit=wheels.MARGIN + 30_000, root=here)
    sizes = [size for _, size in wheels.trips(here)]
    assert len(parts) > 1
    assert all(tree_bytes < size <= wheels.MARGIN + 30_000 for size in sizes)  # what git ignores does not travel
    wheels.rehearse(there, sys.executable, root=here)
    assert (there / "build" / "gpu" / "site" / "small.py").read_text() == "value = 1\n"
    assert not (there / "ignored").exists()
    points = importlib.metadata.distributions(path=[str(there / "build" / "gpu" / "site")])
    names = {point.value for distribution in points for point in distribution.entry_points if "vllm" in point.group}
    assert names == {"qembed.serve.vllm_plugin:register"}


def test_a_trip_over_the_limit_is_refused(tmp_path: Path, wheels: ModuleType) -> None:
    here = tmp_path / "here"
    repository(here, 20_000)
    wheel_folder(tmp_path / "wheels")
    wheels.pack(tmp_path / "wheels", everything=True, root=here)
    with pytest.raises(ValueError, match="trip 1"):
        wheels.rehearse(tmp_path / "there", sys.executable, root=here, limit=20_000)


def test_a_damaged_part_is_noticed_and_missing_ones_are_named(tmp_path: Path, wheels: ModuleType) -> None:
    here = tmp_path / "here"
    repository(here, 20_000)
    wheel_folder(tmp_path / "wheels")
    wheels.pack(tmp_path / "wheels", everything=True, limit=wheels.MARGIN + 30_000, root=here)
    second = here / wheels.OUTGOING / "part-01"
    data = second.read_bytes()
    second.unlink()
    assert wheels.receive(here) == ["part-01"]
    second.write_bytes(b"y" + data[1:])
    with pytest.raises(ValueError, match="part-01 is damaged"):
        wheels.receive(here)
    second.write_bytes(data)
    assert wheels.receive(here) == []


def test_members_left_out_of_a_wheel_leave_its_record_too(tmp_path: Path, wheels: ModuleType) -> None:
    wheel_folder(tmp_path / "wheels")
    output = tmp_path / "slim.whl"
    assert wheels.slim(tmp_path / "wheels" / "vllm-1-py3-none-any.whl", output) == ["vllm/_moe_C_stable_libtorch.abi3.so"]
    with zipfile.ZipFile(output) as wheel:
        assert "vllm/__init__.py" in wheel.namelist()
        assert not any("_moe_C" in line for line in [*wheel.namelist(), wheel.read("vllm-1.dist-info/RECORD").decode()])
