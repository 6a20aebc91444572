"""The 0.6B shape with the same random weights in each format that `make bench-serve` needs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from random_checkpoint import write as write_random

from qembed.checkpoint.description import INDEX, Checkpoint

GROUP_SIZE = 128
QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_all(folder: Path, llama_python: Path, say: Callable[[str], None]) -> None:
    """Write what is missing in `folder`: `float` (bfloat16), `int4` (AWQ, plain rounding), and GGUF files in float16 and 4 bit.

    Raises:
        subprocess.CalledProcessError: a GGUF file could not be written.
    """
    write_int4(folder, say)
    original, half = folder / "float", folder / "half.safetensors"
    if not (folder / "Q4_K_M.gguf").exists():
        say("writing GGUF files")
        to_half(Checkpoint("random", original), half)
        script = Path(__file__).parent / "write_gguf.py"
        command = [llama_python, script, original / "config.json", half, folder]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        half.unlink()


def write_int4(folder: Path, say: Callable[[str], None]) -> Path:
    """Write what is missing of `float` and `int4` in `folder`; the latter's path."""
    original, int4 = folder / "float", folder / "int4"
    if not (original / "config.json").exists():
        say("writing random weights")
        write_random("0.6B", original)
    if not (int4 / "config.json").exists():
        say("rounding them to INT4")
        round_to_int4(Checkpoint("random", original), int4)
    return int4


def round_to_int4(original: Checkpoint, folder: Path) -> None:
    """Write `original` as an AWQ checkpoint, each weight rounded to the nearest level of its group.

    Calibration would change only the values, which affect neither time nor memory.
    """
    import torch
    from safetensors.torch import save_file

    from qembed.checkpoint import awq_layout
    from qembed.quantize.awq import range_grid
    from qembed.quantize.writer import int4_config

    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(by_file(original)):
        tensors = {}
        for name in names:
            stem, _, kind = name.rpartition(".")
            tensor = original.tensor(name)
            if kind != "weight" or stem.rpartition(".")[2] not in QUANTIZED:
                tensors[name] = tensor.half()
                continue
            weight = tensor.float()
            grid = range_grid(weight, GROUP_SIZE)
            tensors[f"{stem}.qweight"] = awq_layout.pack(grid.quantize(weight).T.to(torch.uint8))
            tensors[f"{stem}.qzeros"] = awq_layout.pack(grid.zero_point.T.to(torch.uint8))
            tensors[f"{stem}.scales"] = grid.scale.T.half().contiguous()
        file = f"model-{number:03d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for companion in original.folder.iterdir():
        if companion.suffix == ".json" and companion.name not in (INDEX, "config.json"):
            shutil.copyfile(companion, folder / companion.name)
    shutil.copytree(original.folder / "1_Pooling", folder / "1_Pooling", dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(int4_config(original.config, GROUP_SIZE)))


def to_half(original: Checkpoint, file: Path) -> None:
    """Write all tensors of `original` into one file in float16, which numpy can read."""
    from safetensors.torch import save_file

    save_file({name: original.tensor(name).half() for name in original.shapes()}, file)


def by_file(original: Checkpoint) -> list[list[str]]:
    """The names of the tensors, file by file."""
    files: dict[str, list[str]] = {}
    for name, file in json.loads((original.folder / INDEX).read_text())["weight_map"].items():
        files.setdefault(file, []).append(name)
    return list(files.values())
