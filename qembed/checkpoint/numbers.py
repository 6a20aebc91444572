"""Bounds of the numbers in a config.json, checked before anything is built from them.

Sizes are compared with the tensors later. Until then a library would already have made a list of 10⁹ layers, or a table of 10¹⁸
positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qembed.errors import BadInput

LARGEST = {
    "num_hidden_layers": 2**12,
    "hidden_size": 2**18,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**30,
    "sliding_window": 2**30,
    "max_window_layers": 2**20,
    "rope_theta": 2**40,
}
"""Many times what any published decoder has."""
ROPE = ("rope_scaling", "rope_parameters")
LARGEST_ROPE = {"rope_theta": 2**40, "original_max_position_embeddings": 2**30}
LARGEST_FACTOR = 2**14
"""Of any other number in a section of ROPE, such as the factor by which the context is stretched."""


def check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """Check that no number of `config`, read from `path`, is larger than any model could have, at any depth.

    Numbers that are missing, too small or of another type are left to their readers; a number that is written as text is not,
    because some of them convert it.

    Raises:
        BadInput: one is too large or text; the message names it.
    """
    for name, value, largest in _limited(config):
        if isinstance(value, str) and _is_number(value):
            raise BadInput(f"{path}: {name} is {value[:40]!r}, which is text; write it without quotes")
        if isinstance(value, int | float) and not -largest <= value <= largest:
            shown = f"{value:,}" if isinstance(value, float) or value.bit_length() < 100 else f"of {value.bit_length()} bits"
            raise BadInput(f"{path}: {name} is {shown}, at most {largest:,} can be true")


def _limited(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Name, value and largest value of each number that has one. Names start with the section of ROPE that they are in."""
    waiting: list[tuple[str, str, Any]] = [("", str(name), value) for name, value in config.items()]
    while waiting:
        section, name, value = waiting.pop()
        if isinstance(value, Mapping):
            inner = section or (name if name in ROPE else "")
            waiting += [(inner, str(key), element) for key, element in value.items()]
        elif isinstance(value, list):
            waiting += [(section, name, element) for element in value]
        elif section:
            yield f"{section}: {name}", value, LARGEST_ROPE.get(name, LARGEST_FACTOR)
        elif name in LARGEST:
            yield name, value, LARGEST[name]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
