"""Sizes of numbers, by safetensors' names."""

from __future__ import annotations

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPE_BYTES = {"float16": BYTES["F16"], "bfloat16": BYTES["BF16"], "float32": BYTES["F32"]}
"""By torch's names of the dtypes that a model computes in."""
