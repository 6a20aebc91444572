"""Time of one INT4 layer by the compiled kernel and by the alternatives: `python bench/int4_kernel.py`.

A layer of 1,024 inputs and 6,144 outputs (gate and up projections of the 0.6B in one), groups of 128. Twelve layers take
turns, so that weights come from memory and not from a cache, as in a model.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

AVX2 = Path(__file__).parents[1] / "tests" / "e2e" / "avx2"
ROWS = (1, 2, 4, 8, 16, 43, 128, 344, 1000)
INPUTS, OUTPUTS, GROUP, LAYERS = 1024, 6144, 128, 12
LEAST_SECONDS = 0.4


def main() -> None:
    """Restart limited to AVX2, measure, and write the table."""
    if os.environ.get("PYTHONPATH") != str(AVX2):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONPATH": str(AVX2)})
    import torch
    from results import machine, replace_section, table

    from qembed.serve.vllm_plugin import int4_native, int4_torch

    torch.manual_seed(0)
    values = [torch.randint(0, 16, (OUTPUTS, INPUTS), dtype=torch.uint8) for _ in range(LAYERS)]
    scales, zeros = torch.rand(OUTPUTS, INPUTS // GROUP).half() / 100, torch.full((OUTPUTS, INPUTS // GROUP), 8)

    def reader(of: torch.Tensor) -> int4_torch.ReadRows:
        return lambda start, end: of[start:end]

    compiled = [int4_native.prepare(reader(value), scales, zeros, INPUTS) for value in values]
    unpacked_in_torch = [int4_torch.prepare(reader(value), scales, zeros) for value in values]
    dense = [int4_torch.dequantize(value, torch.empty(OUTPUTS, INPUTS)) for value in unpacked_in_torch]
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(value.int(), 1) for value in values]
    both = torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1).bfloat16().contiguous()
    ways: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
        "float32 GEMM": lambda x, i: torch.nn.functional.linear(x, dense[i]),
        "compiled kernel": lambda x, i: int4_native.linear(x, compiled[i], OUTPUTS, None),
        "in torch": lambda x, i: int4_torch.linear(x, unpacked_in_torch[i], None),
        "torch's int4pack, bfloat16": lambda x, i: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), packed[i], GROUP, both
        ),
    }
    lines = []
    for rows in ROWS:
        x = torch.randn(rows, INPUTS)
        times = [milliseconds(way, x) for way in ways.values()]
        lines.append([str(rows), *(f"{time_ms:.2f}" for time_ms in times), f"{times[0] / times[1]:.1f}"])
        print(*lines[-1], sep="  ", flush=True)
    head = (
        f"## One INT4 layer on a CPU with AVX2\n\n`make bench-serve` on {machine()}, {torch.get_num_threads()} threads; "
        f"{time.strftime('%Y-%m-%d')}. torch {torch.__version__}, limited to AVX2.\n\n"
        f"Milliseconds for {INPUTS:,} inputs and {OUTPUTS:,} outputs in groups of {GROUP}, by rows; the best of some passes "
        f"over {LAYERS} layers. There is one algorithm for all numbers of rows; only up to 4 rows (FUSED in int4_kernel.cpp) "
        "weights are unpacked in registers instead of once for all rows."
    )
    columns = ["rows", *ways, "float32 / compiled"]
    replace_section("bench-int4-kernel", f"{head}\n\n{table(columns, lines)}")


def milliseconds(way: Callable[..., object], x: object) -> float:
    """Time of a call: the best average of passes over all layers."""
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < LEAST_SECONDS:
        begin = time.perf_counter()
        for layer in range(LAYERS):
            way(x, layer)
        best = min(best, (time.perf_counter() - begin) / LAYERS)
    return 1000 * best


if __name__ == "__main__":
    main()
