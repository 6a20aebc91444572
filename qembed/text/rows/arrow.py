"""The values of Arrow columns as Python has them, the same for the readers of rows and of vectors."""

from __future__ import annotations

import datetime
import uuid
from typing import Any

from qembed.text.rows.values import UUID_BYTES, narrow_float

NARROW = {"halffloat": "float16", "float": "float32"}
"""Arrow's names of the floats that have fewer bits than Python's, and numpy's."""


class _Undecodable:
    """A string that is not UTF-8, which Parquet does not check."""


UNDECODABLE = _Undecodable()


def python_values(column: Any, is_uuid: bool = False) -> list[Any]:
    """The values of an Arrow array; `is_uuid`: bytes are UUIDs.

    `UNDECODABLE` stands for a string that is not UTF-8. Dates that Python does not have are text, and so are times with
    nanoseconds, in ISO 8601. Floats of 16 and 32 bits are `StoredFloat`.
    """
    import pyarrow as arrow

    kind = column.type
    if arrow.types.is_dictionary(kind):
        known = python_values(column.dictionary)
        return [None if at is None else known[at] for at in column.indices.to_pylist()]
    if str(kind) in NARROW:
        return [None if value is None else narrow_float(value, NARROW[str(kind)]) for value in column.to_pylist()]
    if (arrow.types.is_timestamp(kind) or arrow.types.is_duration(kind) or arrow.types.is_time(kind)) and kind.unit == "ns":
        return _without_nanoseconds(column)
    try:
        values = column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        values = [_value(scalar) for scalar in column]
    if is_uuid:
        return [uuid.UUID(bytes=v) if isinstance(v, bytes) and len(v) == UUID_BYTES else v for v in values]
    return values


def _without_nanoseconds(column: Any) -> list[Any]:
    """Times, as text where microseconds, which Python has, would lose digits."""
    import pyarrow as arrow
    from pyarrow import compute

    kind = column.type
    if arrow.types.is_timestamp(kind):
        target = arrow.timestamp("us", kind.tz)
    else:
        target = arrow.duration("us") if arrow.types.is_duration(kind) else arrow.time64("us")
    values = python_values(column.cast(target, safe=False))
    numbers = column.cast(arrow.int64())
    remainders = compute.subtract(numbers, compute.multiply(compute.divide(numbers, 1000), 1000)).to_pylist()
    return [_with_nanoseconds(value, column[row]) if remainders[row] else value for row, value in enumerate(values)]


def _with_nanoseconds(value: Any, scalar: Any) -> str:
    import pyarrow as arrow

    text = str(scalar.cast(arrow.string()).as_py())
    return text.replace(" ", "T", 1) if isinstance(value, datetime.datetime) else text


def _value(scalar: Any) -> Any:
    """One value: `UNDECODABLE` if it is a string that is not UTF-8, text if Python has no such date."""
    import pyarrow as arrow

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return UNDECODABLE
    except (ValueError, OverflowError):
        return scalar.cast(arrow.string()).as_py()
