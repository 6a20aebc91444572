"""The piece "fidelity" of gpu.py: vectors that a server on a GPU gives, against those of its weights, dequantized.

The reference is transformers in float32 with the INT4 weights multiplied out, and for FP16 with the original weights. So a
difference is one of kernels and dtypes, not of quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpu_variants
import numpy as np
from gpu_quantize import quantized
from gpu_serve import limits, serving, text_of, vectors
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
LENGTHS = (2, 17, 130, 500, 2048, 3900)
"""Tokens. Beyond the first step of 2,048 a text is computed in pieces, and its keys and values span them."""
CONTEXT = 4096


def texts(longest: int) -> list[str]:
    """Phrases, and texts of LENGTHS up to `longest` tokens."""
    tokenizer = find(SAMPLE).tokenizer()
    return [
        *PHRASES,
        *(text_of(length, lambda text: len(tokenizer.encode(text).ids)) for length in LENGTHS if length <= longest),
    ]


def sample_int4(setup: Setup) -> Path:
    """The sample in INT4, made once."""
    folder = setup.build / "sample-AWQ-INT4"
    if not (folder / "config.json").exists():
        quantized(find(SAMPLE).folder, folder, setup.device, setup.build / "sample.log")
    return folder


def served(name: str) -> Step:
    """Cosines of the vectors that the variant `name` serves with the reference's; the lowest, and the mean distance."""

    def measure(setup: Setup) -> Mapping[str, Any]:
        variant = gpu_variants.on(setup, name)
        folder = sample_int4(setup) if variant.int4 else find(SAMPLE).folder
        batch = texts(500 if setup.is_rehearsal else CONTEXT)
        with serving(setup, folder, *limits(setup, CONTEXT), name=f"fidelity-{name}", variant=variant) as ready:
            together = _floats(vectors(ready, batch))
            alone = _floats([vectors(ready, [text])[0] for text in batch])
        engine = gpu_variants.loaded(ready["log"].read_text(errors="replace"))
        gpu_variants.check(name, variant, engine)
        expected = reference.embed(reference.load(find(str(folder))), batch)
        cosines = np.sum(together * expected, axis=1)
        return {
            "texts": len(batch),
            "loaded": engine,
            "lowest": float(cosines.min()),
            "mean_distance": float(np.mean(1 - cosines)),
            "lowest_of_the_longest": float(cosines[-2:].min()),
            "alone_or_together": float(np.sum(together * alone, axis=1).min()),
        }

    return Step(name, 70, measure)


def _floats(parts: list[bytes]) -> NDArray[np.float32]:
    """Vectors [n, d] of their bytes."""
    return np.stack([np.frombuffer(part, np.float32) for part in parts])


STEPS = tuple(map(served, (name for name in gpu_variants.VARIANTS if name != "int4, 8k context")))
