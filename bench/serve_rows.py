"""Which columns the table of `make bench-serve` has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "bench" / "serve"
LLAMA = ROOT / "build" / "llama-cpp" / "bin" / "python"
AVX2 = ROOT / "tests" / "e2e" / "avx2"
AGAIN = "float32-again"
"""A second server like float32's, that is asked in turns with it: how far apart two servers are that differ in nothing."""
LIMITS = {"--max-model-len": "1024", "--max-num-seqs": "8", "--max-num-batched-tokens": "1024"}


@dataclass(frozen=True)
class Row:
    """One column of the table.

    Attributes:
        name: what `--only` takes.
        title: what the table calls it.
        kind: "qembed", "vllm" (stock, without our plugin and our launcher) or "llama".
        model: a folder or file in BUILD.
        options: of the server.
    """

    name: str
    title: str
    kind: str
    model: str
    options: tuple[str, ...] = ()


ROWS = (
    Row("float32", "stock vLLM float32", "vllm", "float", ("--dtype", "float32")),
    Row("bfloat16", "stock vLLM bfloat16", "vllm", "float", ("--dtype", "bfloat16")),
    Row("launcher", "qembed serve --fp16, float32", "qembed", "float", ("--fp16", "--dtype", "float32")),
    Row("int4", "qembed INT4", "qembed", "int4", ("--int4", "--dtype", "float32")),
    Row("int4-int8", "qembed INT4, INT8 table", "qembed", "int4", ("--int4", "--dtype", "float32", "--token-table", "int8")),
    Row("Q4_K_M", "llama.cpp Q4_K_M", "llama", "Q4_K_M.gguf"),
    Row("Q4_0", "llama.cpp Q4_0", "llama", "Q4_0.gguf"),
)
IN_TURNS = {
    "turns": tuple(row for row in ROWS if row.name in ("float32", "int4", "Q4_K_M")),
    "turns-launcher": (*(row for row in ROWS if row.name in ("float32", "launcher")), replace(ROWS[0], name=AGAIN)),
}
"""What is asked in turns, by the name of the measurement: all in one group would not fit into 24 GiB."""
