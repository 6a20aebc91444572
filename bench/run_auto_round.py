"""Run auto-round on a CPU, in its own environment, on token rows of ours, and export to AWQ's format.

auto-round takes calibration samples of one length (`seqlen`) and drops shorter ones, so the rows are joined end to end and cut
into blocks of 512 tokens, which is what AutoAWQ does with them. It gets no tokenizer: with one it would leave the tokens whose
id is the padding's out of its loss, and in Qwen3-Embedding those are the last tokens, which carry the vectors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

LENGTH = 512
ITERATIONS = 200
"""auto-round's own default, written out because its default for the setting is None."""


def main() -> None:
    """Read the command line and quantize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--rows", type=Path, required=True, help="JSON: one list of token ids for each text")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--asymmetric", action="store_true", help="with zero points, as AWQ has them [default: without]")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=f"steps for each block [default: {ITERATIONS}]")
    arguments = parser.parse_args()

    import torch
    from auto_round import AutoRound

    rows = json.loads(arguments.rows.read_text())
    ids = torch.tensor([token for row in rows for token in row])
    blocks = list(ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH))
    # amp: bfloat16, which most CPUs have no fast arithmetic for. torch.compile would want a C++ compiler.
    quantizer = AutoRound(
        str(arguments.model),
        scheme="W4A16",
        sym=not arguments.asymmetric,
        group_size=128,
        dataset=blocks,
        seqlen=LENGTH,
        nsamples=len(blocks),
        iters=arguments.iterations,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    quantizer.quantize_and_save(str(arguments.output), format="auto_awq")
    for path in [*arguments.output.glob("*/*")]:  # AutoRound creates a subfolder
        path.rename(arguments.output / path.name)


if __name__ == "__main__":
    main()
