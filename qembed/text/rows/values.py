"""Ids as text, and values in a form that every output and database takes."""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections.abc import Mapping
from typing import Any

EXACT = 2**53
"""A float of at least this size may have lost the last digits of an integer."""
UUID_BYTES = 16


class StoredFloat(float):
    """A float that had fewer bits, or more digits, where it was stored.

    Attributes:
        text: the shortest number that is the same there: "0.1" in 32 bits, where Python's float of it is 0.10000000149011612.
        exact: a float of at least this size may have lost digits.
    """

    __slots__ = ("exact", "text")
    text: str
    exact: int


def narrow_float(value: float, dtype: str) -> StoredFloat:
    """`value` with the precision of "float16" or "float32"."""
    import numpy as np

    number = StoredFloat(value)
    number.text = str(np.dtype(dtype).type(value))
    number.exact = 2 ** (np.finfo(dtype).nmant + 1)
    return number


def written_float(digits: str) -> float:
    """The float that `digits` stand for; a `StoredFloat` that is nowhere exact if it has fewer digits than these."""
    value = float(digits)
    try:
        if not math.isfinite(value) or decimal.Decimal(digits) == decimal.Decimal(repr(value)):
            return value
    except decimal.InvalidOperation:  # an exponent that decimals don't have
        pass
    number = StoredFloat(value)
    number.text, number.exact = digits, 0
    return number


class NoId(ValueError):
    """A value cannot serve as an id; the message says why."""


def id_text(value: Any) -> str | None:
    """The id of a row as text, the same for equal values in every format and command; None if `value` is missing.

    Text stays as it is, without NUL, which databases refuse. Floats that are integers (pandas makes them of integers with
    gaps) and decimals lose ".0". Bytes become hexadecimal, UUIDs their usual form, dates and times ISO 8601.

    Raises:
        NoId: `value` is a truth value, a list or an object, infinite, or a float that may be inexact: beyond 2^53 (of 32 bits:
            2^24, of 16 bits: 2^11), or written with more digits than it has.
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
    exact, text = (value.exact, value.text) if isinstance(value, StoredFloat) else (EXACT, repr(value))
    if abs(value) >= exact:
        raise NoId(f"{text}, a float that may have lost digits; store ids as integers or text")
    return str(int(value)) if value.is_integer() else text


def _decimal_text(value: decimal.Decimal) -> str | None:
    if not value.is_finite():
        return None
    return str(int(value)) if value == value.to_integral_value() else f"{value:f}"


def storable(value: Any) -> Any:
    """A kept value without what outputs and databases have no form for: NUL is removed, bytes become hexadecimal.

    Lists and objects are changed inside. UUIDs and decimals become text, dates and times ISO 8601.
    """
    if isinstance(value, str):
        return value.replace("\0", "") if "\0" in value else value
    if isinstance(value, StoredFloat):
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
        return dict(zip(_storable_names(value), map(storable, value.values()), strict=True))
    if isinstance(value, list | tuple):
        return [storable(part) for part in value]
    return value


def _storable_names(fields: Mapping[Any, Any]) -> list[Any]:
    """The names of `fields` without NUL; with U+FFFD in its place where two names would be the same without it."""
    taken = {name for name in fields if storable(name) == name}
    names = []
    for name in fields:
        new = storable(name)
        if new != name:
            if new in taken:
                new = name.replace("\0", "\ufffd")
            while new in taken:
                new += "\ufffd"
            taken.add(new)
        names.append(new)
    return names
