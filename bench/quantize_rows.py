"""Which rows the tables of `make bench-quantize` have: a setting that is left out or added is a row with other options."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from qembed.checkpoint.find import SAMPLE

ROOT = Path(__file__).parents[1]
LLM = "llm"
"""The language model in the folder QEMBED_BENCH_LLM."""
LLM_FOLDER, LLM_TEXTS = (Path(os.environ.get(name, "")) for name in ("QEMBED_BENCH_LLM", "QEMBED_BENCH_TEXTS"))
"""The folder, and the file of the texts, one a line, to measure on. Neither ships with qembed."""
CALIBRATION_TEXTS, CHECK_TEXTS = 418, 32
"""What `qembed quantize` calibrates with by default, and the texts that it keeps apart."""

ENVIRONMENTS = {
    "qembed": Path(sys.executable).parent,
    "autoawq": ROOT / "build" / "autoawq" / "bin",
    "auto-round": ROOT / "build" / "auto-round" / "bin",
}
PACKAGES = {
    "qembed": ("qembed-int4", "torch", "transformers"),
    "autoawq": ("autoawq", "torch", "transformers"),
    "auto-round": ("auto-round", "torch", "transformers"),
}
CODE = {
    "qembed": (
        "quantize/*.py",
        "quantize/*.cpp",
        "qembed/checkpoint/awq_layout.py",
        "quantize/data/*",
        "bench/random_checkpoint.py",
        "bench/language_model.py",
    ),
    "autoawq": ("quantize/autoawq.py", "quantize/calibration.py", "quantize/data/*", "bench/run_stock_autoawq.py"),
    "auto-round": ("quantize/calibration.py", "quantize/data/*", "bench/run_auto_round.py"),
}
"""The files that decide the numbers of a row, by its environment."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: for `--only`.
        title: in the table; {version} is that of the first package of its environment.
        options: of `qembed quantize`, or of `script`.
        environment: one of ENVIRONMENTS.
        script: a file of this folder that is run instead of `qembed quantize`.
        model: the model to quantize: the sample, LLM, or SIZE[:LAYERS[:VOCABULARY]] for bench/random_checkpoint.py.
        note: a remark under the table.
    """

    name: str
    title: str
    options: tuple[str, ...] = ()
    environment: str = "qembed"
    script: str | None = None
    model: str = SAMPLE
    note: str = ""


QUALITY = (
    Row(
        "plain",
        "plain rounding",
        ("--scales", "none", "--no-clip", "--rounding", "rtn", "--target", "layer"),
    ),
    Row(
        "autoawq",
        "AutoAWQ {version}",
        ("--engine", "autoawq"),
        "autoawq",
        note="AutoAWQ runs as `qembed quantize --engine autoawq`: its own search, clipping and packing, in float32, "
        "calibration blocks cut from the same texts, and our fix for its bug on CPUs.",
    ),
    Row(
        "autoawq-stock",
        "AutoAWQ {version} as it comes, on a CPU",
        ("--engine", "autoawq"),
        "autoawq",
        "run_stock_autoawq.py",
        note="Without the fix, AutoAWQ on a CPU leaves the scales of the first grid point in the weights.",
    ),
    Row(
        "auto-round",
        "auto-round {version}, with zero points",
        ("--asymmetric",),
        "auto-round",
        "run_auto_round.py",
        note="auto-round: 200 iterations (its default) on blocks of 512 tokens cut from the same texts; its AWQ export. It "
        "computes in float32, because bfloat16 is slow on most CPUs, and therefore writes the token table in float32 too.",
    ),
    Row("auto-round-symmetric", "auto-round {version}, without (its default)", (), "auto-round", "run_auto_round.py"),
    Row("ours", "**qembed**"),
    Row("no-scales", "qembed without scales", ("--scales", "none")),
    Row("no-clip", "qembed without clipping", ("--no-clip",)),
    Row("rtn", "qembed without GPTQ rounding", ("--rounding", "rtn")),
    Row("own-target", "qembed without fitting to the original model", ("--target", "layer")),
    Row(
        "original-inputs",
        "the same, fitted to the original model's inputs",
        ("--target", "layer", "--inputs", "original"),
        note="Gram matrices are of the inputs that come through the layers already quantized. The two rows with `--target "
        "layer` compare these with the original model's inputs (`--inputs original`). Only with the quantized model's inputs "
        "can a layer compensate for the error before it (`--target original`, the default).",
    ),
    Row("no-prefixes", "qembed without prefixes of texts", ("--prefixes", "0")),
    Row("no-weighing", "qembed without weighing last tokens", ("--last-share", "0")),
    Row("no-mixed", "qembed without mixed copies of texts", ("--mixed", "0")),
    Row(
        "refined",
        "qembed with a last stage by gradient",
        ("--refine", "3"),
        note="The last stage (`--refine`) improves the texts that it is trained on and others hardly, so it is off by default.",
    ),
    Row("group-64", "qembed, groups of 64", ("--group-size", "64")),
    Row("group-32", "qembed, groups of 32", ("--group-size", "32")),
)

GROUPS_OF_64 = ("--group-size", "64")
LANGUAGE = (
    Row("llm-plain", "plain rounding", (*GROUPS_OF_64, *QUALITY[0].options), model=LLM),
    Row(
        "llm-awq",
        "AWQ: scales, clipping, round-to-nearest",
        (*GROUPS_OF_64, "--rounding", "rtn", "--target", "layer"),
        model=LLM,
    ),
    Row("llm-ours", "**qembed**", GROUPS_OF_64, model=LLM),
    Row("llm-own-target", "qembed without fitting to the original model", (*GROUPS_OF_64, "--target", "layer"), model=LLM),
    Row("llm-no-scales", "qembed without scales", (*GROUPS_OF_64, "--scales", "none"), model=LLM),
    Row("llm-no-clip", "qembed without clipping", (*GROUPS_OF_64, "--no-clip"), model=LLM),
    Row(
        "llm-last-share",
        "qembed, last tokens count half",
        (*GROUPS_OF_64, "--last-share", "0.5"),
        model=LLM,
        note="This tokenizer appends no last token, so every token has the same weight by default.",
    ),
)

FEW = ("--calibration-texts", "64", "--max-tokens", "64")

SPEED = (
    Row("0.6B", "the shape of Qwen3-Embedding-0.6B, 28 layers", (), model="0.6B"),
    Row("layer", "one of its layers, qembed", FEW, model="0.6B:2"),
    Row(
        "layer-autoawq",
        "one of its layers, AutoAWQ {version}",
        (*FEW, "--engine", "autoawq"),
        "autoawq",
        model="0.6B:2",
        note="A layer: the second of two, from the end of the first to its own end; peak memory is of the whole run.",
    ),
)

MEMORY = (
    Row("8B-2", "the shape of Qwen3-Embedding-8B, 2 layers", FEW, model="8B:2:13824"),
    Row(
        "8B-8",
        "the same with 8 layers",
        FEW,
        model="8B:8:13824",
        note="The token table has the 13,824 rows of the sample's tokenizer instead of 151,665: the 1.2 GB of a full one do "
        "not depend on the number of layers and would hide the part that does.",
    ),
)

TABLES = {"quality": QUALITY, "llm": LANGUAGE, "speed": SPEED, "memory": MEMORY}
