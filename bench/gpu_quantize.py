"""The piece "quantize" of gpu.py, which needs no vLLM: time, peak memory and integers of `qembed quantize` on a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import process
from gpu_steps import ROOT, Setup, Step

from qembed.checkpoint import awq_layout
from qembed.checkpoint.find import SAMPLE, find

PEAKS = "QEMBED_BENCH_PEAKS"
"""The environment variable with the file for the peak memory of a measured `qembed`."""
MEASURED = f"""
import atexit, json, os
def write():
    import torch
    peak = {{"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}}
    json.dump(peak, open(os.environ["{PEAKS}"], "w"))
atexit.register(write)
from qembed.cli import main
main()
"""
FEW_LAYERS = 2
"""Of each shape, whose layers take the same time each; the 0.6B is then quantized whole."""
TESTS = ("tests/quantize/test_cuda.py",)
PLUGIN_TESTS = ("tests/serve/vllm_plugin/test_cuda.py",)


def source(size: str, setup: Setup, layers: int | None = None) -> Path:
    """A checkpoint of random weights in the shape of `size`; the sample in a rehearsal."""
    if setup.is_rehearsal:
        return find(SAMPLE).folder
    from random_checkpoint import write

    folder = setup.build / (f"random-{size}" if layers is None else f"random-{size}-{layers}-layers")
    if not (folder / "config.json").exists():  # which is written last
        write(size, folder, layers)
    return folder


def random_int4(size: str, setup: Setup, *, reranker: bool = False) -> Path:
    """An embedder or a reranker of random 4-bit integers in the shape of `size`; in a rehearsal a single layer, few tokens."""
    from random_checkpoint import write

    folder = setup.build / f"random-{'reranker-' if reranker else ''}{size}-AWQ-INT4"
    if not (folder / "config.json").exists():
        layers, vocabulary = (1, find(SAMPLE).tokenizer().get_vocab_size() + 2) if setup.is_rehearsal else (None, None)
        write(size, folder, layers, vocabulary=vocabulary, reranker=reranker, int4=True)
    return folder


def quantized(model: Path, output: Path, device: str, log: Path) -> dict[str, Any]:
    """Run `qembed quantize`; its seconds, and its peak bytes in main memory and on the device."""
    shutil.rmtree(output, ignore_errors=True)
    peaks = log.with_suffix(".peaks.json")
    peaks.unlink(missing_ok=True)
    options = ["--model", str(model), "--output", str(output), "--device", device, "--json"]
    command = [sys.executable, "-c", MEASURED, "quantize", *options]
    measured = process.run(command, log, {**os.environ, PEAKS: str(peaks)})
    on_device: dict[str, int] = json.loads(peaks.read_text())
    return {
        "seconds": round(measured.seconds, 1),
        "peak_bytes": measured.peak_bytes,
        "device_peak_allocated": on_device["allocated"],
        "device_peak_reserved": on_device["reserved"],
    }


def shape(size: str, layers: int | None) -> Step:
    """Quantize random weights in the shape of `size`."""

    def measure(setup: Setup) -> Mapping[str, Any]:
        model = source(size, setup, layers)
        output = setup.build / f"{model.name}-quantized-AWQ-INT4"
        numbers = quantized(model, output, setup.device, setup.build / f"quantize-{model.name}.log")
        return {**numbers, "layers": find(str(model)).config["num_hidden_layers"]}

    return Step(f"{size}, {layers} layers" if layers else size, 90 if layers else 300, measure)


def integers(setup: Setup) -> Mapping[str, Any]:
    """Quantize the sample on the CPU, and twice on the device: are the integers the same?"""
    model = find(SAMPLE).folder
    folders = {name: setup.build / f"sample-{name}-AWQ-INT4" for name in ("host", "device", "again")}
    for name, folder in folders.items():
        quantized(model, folder, "cpu" if name == "host" else setup.device, setup.build / f"integers-{name}.log")
    return {
        "against_cpu": agreement(folders["host"], folders["device"]),
        "against_itself": agreement(folders["device"], folders["again"]),
    }


def agreement(first: Path, second: Path) -> dict[str, float]:
    """How far two INT4 checkpoints of one model agree.

    Returns:
        integers: the share of equal 4-bit integers. scales: the share of equal (scale, zero point) pairs.
        integers_where_scales_agree: the share of equal integers among those of groups with the same pair.
        layers: the share of linear layers that are equal to the last bit.
    """
    checkpoints = find(str(first)), find(str(second))
    equal = same_scale = same_group_equal = same_group = values = scales = equal_layers = layers = 0
    for name in (name for name in checkpoints[0].files if name.endswith(".qweight")):
        stem = name.removesuffix("qweight")
        left, right = ([c.tensor(f"{stem}{part}") for part in ("qweight", "qzeros", "scales")] for c in checkpoints)
        integers = awq_layout.unpack(left[0]) == awq_layout.unpack(right[0])
        group = (awq_layout.unpack(left[1]) == awq_layout.unpack(right[1])) & (left[2] == right[2])
        in_group = group.repeat_interleave(integers.shape[0] // group.shape[0], 0)
        equal, values = equal + int(integers.sum()), values + integers.numel()
        same_scale, scales = same_scale + int(group.sum()), scales + group.numel()
        same_group, same_group_equal = same_group + int(in_group.sum()), same_group_equal + int((integers & in_group).sum())
        equal_layers, layers = equal_layers + bool(integers.all() and group.all()), layers + 1
    return {
        "integers": equal / values,
        "scales": same_scale / scales,
        "integers_where_scales_agree": same_group_equal / max(1, same_group),
        "layers": equal_layers / layers,
    }


def tests(files: tuple[str, ...]) -> Step:
    """The tests in `files`, which are skipped without a GPU."""

    def measure(setup: Setup) -> Mapping[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        (setup.build / "tests.log").write_text(result.stdout + result.stderr)
        counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)}
        if result.returncode not in (0, 5) or "failed" in counts:
            raise ValueError(f"pytest: exit code {result.returncode}: {result.stdout[-1500:]}")
        return counts

    return Step("tests", 90, measure)


STEPS = (
    shape("0.6B", FEW_LAYERS),
    Step("integers", 120, integers),
    tests(TESTS),
    shape("4B", FEW_LAYERS),
    shape("0.6B", None),
)
