"""Ids as text, and the conversion of kept values."""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from typing import Any

import pytest

from qembed.text.rows.values import NoId, id_text, narrow_float, storable

UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (" a ", " a "),
        ("a\0", "a"),
        (7, "7"),
        (-(2**70), str(-(2**70))),
        (3.0, "3"),
        (-0.0, "0"),
        (3.5, "3.5"),
        (decimal.Decimal("3.00"), "3"),
        (decimal.Decimal("3.50"), "3.50"),
        (decimal.Decimal("1E+3"), "1000"),
        (decimal.Decimal("1" * 38), "1" * 38),
        (decimal.Decimal("1" * 30 + ".50"), "1" * 30 + ".50"),
        (b"\x01\xff", "01ff"),
        (UUID, str(UUID)),
        (datetime.date(2026, 11, 27), "2026-11-27"),
        (datetime.datetime(2026, 11, 27, 1, 2, 3), "2026-11-27T01:02:03"),
        (None, None),
        ("", None),
        ("  ", None),
        (b"", None),
        (math.nan, None),
    ],
)
def test_ids(value: Any, text: str | None) -> None:
    assert id_text(value) == text


@pytest.mark.parametrize("value", [True, [1], {"a": 1}, math.inf, 2.0**53, 1e300, object()])
def test_values_that_are_no_ids(value: Any) -> None:
    with pytest.raises(NoId):
        id_text(value)


def test_kept_values() -> None:
    value = {"a\0": ["b\0", b"\0\1", UUID, decimal.Decimal("1.50"), None, True, 2, (3.5,)], "c": "d"}
    assert storable(value) == {"a": ["b", "0001", str(UUID), "1.50", None, True, 2, [3.5]], "c": "d"}
    assert storable(datetime.date(2026, 11, 27)) == "2026-11-27"
    assert storable([datetime.datetime(2026, 11, 27, 1, 2, 3), datetime.time(1, 2)]) == ["2026-11-27T01:02:03", "01:02:00"]


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [(0.1, "float32", "0.1"), (16777215, "float32", "16777215"), (2047, "float16", "2047"), (math.nan, "float16", None)],
)
def test_ids_of_narrow_floats_are_as_short_as_they_were_written(value: float, dtype: str, text: str | None) -> None:
    import numpy as np

    number = narrow_float(float(np.dtype(dtype).type(value)), dtype)
    assert id_text(number) == text
    assert type(storable(number)) is float


@pytest.mark.parametrize(("value", "dtype"), [(2.0**24, "float32"), (-(2.0**24), "float32"), (2.0**11, "float16")])
def test_narrow_floats_that_may_have_lost_digits_are_no_ids(value: float, dtype: str) -> None:
    with pytest.raises(NoId, match="lost digits"):
        id_text(narrow_float(value, dtype))


def test_names_of_kept_fields_that_differ_by_nul_stay_apart() -> None:
    value = {"a\0": 1, "a": 2, "\0a": 3, "a\ufffd": 4, "b\0": 5}
    names = storable(value)
    assert list(names.values()) == [1, 2, 3, 4, 5]
    assert names["a"] == 2
    assert names["a\ufffd"] == 4
    assert names["b"] == 5
    assert not any("\0" in name for name in names)
