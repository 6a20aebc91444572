"""The piece "fidelity" of gpu.py: vectors that a server on a GPU gives, against those of its weights, dequantized.

The reference is transformers in float32 with the INT4 weights multiplied out, and for FP16 with the original weights. So a
difference is one of kernels and dtypes, not of quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gpu_quantize import quantized
from gpu_serve import NO_MACHETE, limits, serving, text_of, vectors
from gpu_steps import Setup, Step
from numpy.typing import NDArray

from qembed.checkpoint.find import SAMPLE, find
from qembed.vectors import reference

PHRASES = (
    "an audio player for the terminal",
    "a library that reads PDF files",
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:music player",
    "Ein Programm, das Musik abspielt und Wiedergabelisten verwaltet.",
    "def add(a, b):\n    return a + b",
)
LENGTHS = (2, 17, 130, 500, 2048, 5000)
"""Tokens. Beyond the first step of 2,048 a text is computed in pieces, and its keys and values span them."""
CONTEXT = 8192


def texts(longest: int) -> list[str]:
    """Phrases, and texts of LENGTHS up to `longest` tokens."""
    tokenizer = find(SAMPLE).tokenizer()
    return [
        *PHRASES,
        *(text_of(length, lambda text: len(tokenizer.encode(text).ids)) for length in LENGTHS if length <= longest),
    ]


def sample_int4(setup: Setup) -> Path:
    """The sample in INT4."""
    folder = setup.build / "sample-AWQ-INT4"
    if not (folder / "config.json").exists():
        quantized(find(SAMPLE).folder, folder, setup.device, setup.build / "sample.log")
    return folder


def served(name: str, *options: str, int4: bool = True, variables: Mapping[str, str] | None = None) -> Step:
    """Cosines of served vectors with the reference's; the lowest, and the mean distance."""

    def measure(setup: Setup) -> Mapping[str, Any]:
        folder = sample_int4(setup) if int4 else find(SAMPLE).folder
        batch = texts(500 if setup.is_rehearsal else CONTEXT)
        chosen = [*limits(setup, CONTEXT), *([] if setup.is_rehearsal else options)]
        with serving(setup, folder, *chosen, name=f"fidelity-{name}", int4=int4, variables=variables) as ready:
            together = _floats(vectors(ready, batch))
            alone = _floats([vectors(ready, [text])[0] for text in batch])
        expected = reference.embed(reference.load(find(str(folder))), batch)
        cosines = np.sum(together * expected, axis=1)
        return {
            "texts": len(batch),
            "dtype": ready["dtype"],
            "lowest": float(cosines.min()),
            "mean_distance": float(np.mean(1 - cosines)),
            "lowest_of_the_longest": float(cosines[-2:].min()),
            "alone_or_together": float(np.sum(together * alone, axis=1).min()),
        }

    return Step(name, 70, measure)


def _floats(parts: list[bytes]) -> NDArray[np.float32]:
    """Vectors [n, d] of their bytes."""
    return np.stack([np.frombuffer(part, np.float32) for part in parts])


STEPS = (
    served("int4"),
    served("int4 by Marlin", variables=NO_MACHETE),
    served("fp16", int4=False),
    served("int4, float16", "--dtype", "float16"),
    served("int4, INT8 table", "--token-table", "int8"),
    served("int4, fp8 keys and values", "--kv-cache-dtype", "fp8"),
)
