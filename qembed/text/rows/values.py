"""Ids as text, and values in a form that every output and database takes."""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from typing import Any

EXACT = 2**53
"""A float of at least this size may have lost the last digits of an integer."""
UUID_BYTES = 16


class NarrowFloat(float):
    """A float that had fewer bits where it was stored.

    Attributes:
        text: the shortest number that is the same in these bits: "0.1", where Python's float of it is 0.10000000149011612.
        exact: a float of at least this size may have lost the last digits of an integer.
    """

    __slots__ = ("exact", "text")
    text: str
    exact: int


def narrow_float(value: float, dtype: str) -> NarrowFloat:
    """`value` with the precision of "float16" or "float32"."""
    import numpy as np

    number = NarrowFloat(value)
    number.text = str(np.dtype(dtype).type(value))
    number.exact = 2 ** (np.finfo(dtype).nmant + 1)
    return number


class NoId(ValueError):
    """A value cannot serve as an id; the message says why."""


def id_text(value: Any) -> str | None:
    """The id of a row as text, the same for equal values in every format and command; None if `value` is missing.

    Text stays as it is, without NUL, which databases refuse. Floats that are integers (pandas makes them of integers with
    gaps) and decimals lose ".0". Bytes become hexadecimal, UUIDs their usual form, dates and times ISO 8601.

    Raises:
        NoId: `value` is a truth value, a list or an object, infinite, or a float beyond 2^53 (of 32 bits: 2^24, of 16 bits:
            2^11), which may be inexact.
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.replace("\0", "")
        return text if text.strip() else None
    if isinstance(value, bool):
        raise NoId("a truth value")
    if isinstance(value, int | uuid.UUID):
        return str(value)
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, decimal.Decimal):
        return _decimal_text(value)
    if isinstance(value, bytes):
        return value.hex() or None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return str(value)
    if isinstance(value, list | tuple | dict):
        raise NoId("an object" if isinstance(value, dict) else "a list")
    raise NoId(f"of the type {type(value).__name__}")


def _float_text(value: float) -> str | None:
    if math.isnan(value):
        return None  # what pandas writes for a missing number
    if math.isinf(value):
        raise NoId("infinite")
    exact, text = (value.exact, value.text) if isinstance(value, NarrowFloat) else (EXACT, repr(value))
    if abs(value) >= exact:
        raise NoId(f"{value!r}, a float that may have lost digits; store ids as integers or text")
    return str(int(value)) if value.is_integer() else text


def _decimal_text(value: decimal.Decimal) -> str | None:
    if not value.is_finite():
        return None
    return f"{value:f}" if value % 1 else str(int(value))


def storable(value: Any) -> Any:
    """A kept value without what outputs and databases have no form for: NUL is removed, bytes become hexadecimal.

    Lists and objects are changed inside. UUIDs and decimals become text, dates and times ISO 8601.
    """
    if isinstance(value, str):
        return value.replace("\0", "") if "\0" in value else value
    if isinstance(value, NarrowFloat):
        return float(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, uuid.UUID | decimal.Decimal | datetime.timedelta):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, dict):
        return {storable(name): storable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [storable(part) for part in value]
    return value
