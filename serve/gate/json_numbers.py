"""Numbers of a request's JSON."""

from __future__ import annotations

from typing import Any


def whole(value: Any) -> Any:
    """`value`, as an integer if it is a number such as 128.0, which JSON does not distinguish from 128."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
