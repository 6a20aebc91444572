"""The columns of the tables of `make bench-serve`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "bench" / "serve"
LLAMA = ROOT / "build" / "llama-cpp" / "bin" / "python"
AVX2 = ROOT / "tests" / "e2e" / "avx2"
AGAIN = "float32-again"
"""A second server identical to float32's, in turns with it: shows how much two equal servers differ by chance."""
LIMITS = {"--max-model-len": "1024", "--max-num-seqs": "8", "--max-num-batched-tokens": "1024"}


@dataclass(frozen=True)
class Row:
    """One column of the table.

    Attributes:
        name: for `--only`.
        title: in the table.
        kind: "qembed", "vllm" (stock, without our plugin and our launcher) or "llama".
        model: a folder or file in BUILD.
        options: of the server.
        avx2: whether it is limited to AVX2 on newer CPUs.
        avx512: whether it needs a CPU with AVX-512.
    """

    name: str
    title: str
    kind: str
    model: str
    options: tuple[str, ...] = ()
    avx2: bool = True
    avx512: bool = False


ROWS = (
    Row("float32", "stock vLLM float32", "vllm", "float", ("--dtype", "float32")),
    Row("bfloat16", "stock vLLM bfloat16", "vllm", "float", ("--dtype", "bfloat16")),
    Row("launcher", "qembed serve --fp16, float32", "qembed", "float", ("--fp16", "--dtype", "float32")),
    Row("int4", "qembed INT4", "qembed", "int4", ("--int4", "--dtype", "float32")),
    Row("int4-int8", "qembed INT4, INT8 table", "qembed", "int4", ("--int4", "--dtype", "float32", "--token-table", "int8")),
    Row("Q4_K_M", "llama.cpp Q4_K_M", "llama", "Q4_K_M.gguf"),
    Row("Q4_0", "llama.cpp Q4_0", "llama", "Q4_0.gguf"),
)
NATIVE = (
    Row("native-int4", "`qembed serve --int4`", "qembed", "int4", ("--int4",), avx2=False),
    Row("native-int4-float32", "the same, `--dtype float32`", "qembed", "int4", ("--int4", "--dtype", "float32"), avx2=False),
    Row(
        "native-int4-bfloat16", "the same, `--dtype bfloat16`", "qembed", "int4", ("--int4", "--dtype", "bfloat16"), avx2=False
    ),
    Row(
        "native-stock-int4",
        "stock vLLM, INT4 checkpoint, bfloat16",
        "vllm",
        "int4",
        ("--dtype", "bfloat16"),
        avx2=False,
        avx512=True,
    ),
    Row("native-bfloat16", "stock vLLM, FP16 checkpoint, bfloat16", "vllm", "float", ("--dtype", "bfloat16"), avx2=False),
    Row("native-float32", "stock vLLM, FP16 checkpoint, float32", "vllm", "float", ("--dtype", "float32"), avx2=False),
)
"""The same model on all the instructions that the CPU has."""
IN_TURNS = {
    "turns": tuple(row for row in ROWS if row.name in ("float32", "int4", "Q4_K_M")),
    "turns-native": tuple(row for row in NATIVE if row.name in ("native-int4", "native-stock-int4", "native-bfloat16")),
    "turns-launcher": (*(row for row in ROWS if row.name in ("float32", "launcher")), replace(ROWS[0], name=AGAIN)),
}
"""Servers that get requests in turns, by name of the measurement. All in one group would not fit into 24 GiB."""
