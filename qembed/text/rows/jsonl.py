"""JSON lines: an object per line."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qembed.text.rows.plain import LineRecords, numbered
from qembed.text.rows.record import Record
from qembed.text.rows.values import written_float

SHOWN_ERROR = 300
MOST_TOKENS = 2**20
"""Strings, commas and opening brackets of a line. Each stands for some 100 bytes of memory, thirty times its own length."""
LONG_NUMBER = re.compile(r"[0-9.]{16}")
"""A number that a float may not have all digits of; it has those of one with 15."""
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{,]')
"""Commas and brackets inside a string are none."""


class JsonRecords(LineRecords):
    """One JSON object per line. Blank lines are skipped."""

    def read(self, wanted: Mapping[str, str]) -> Iterator[Record]:  # noqa: ARG002
        """The objects with all their fields."""
        for number, line, reason in numbered(self._lines):
            self.bytes_read = self._lines.bytes_read
            if not line.strip() and reason is None:
                continue
            place = f"{self.name}, line {number}"
            if reason is None:
                value, reason = _object(line)
                if reason is None:
                    yield Record(number, place, _with_all_digits(value, line))
                    continue
            yield Record(number, place, {}, reason, line)


class _Repeated(ValueError):
    """A field occurs twice in an object."""


def _object(line: str) -> tuple[dict[str, Any], str | None]:
    if _has_too_many_tokens(line):
        return {}, f"more than {MOST_TOKENS:,} values, names and brackets"
    try:
        value = json.loads(line, object_pairs_hook=_unique)
    except _Repeated as error:
        return {}, str(error)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return {}, f"not JSON: {why}"[:SHOWN_ERROR]
    return (value, None) if isinstance(value, dict) else ({}, "not a JSON object")


def _with_all_digits(value: dict[str, Any], line: str) -> dict[str, Any]:
    """The object of `line` with fields that tell when a float has fewer digits than the file: they may be ids."""
    floats = [name for name, number in value.items() if type(number) is float]
    if floats and LONG_NUMBER.search(line):
        written = json.loads(line, parse_float=written_float)
        value.update((name, written[name]) for name in floats)
    return value


def _has_too_many_tokens(line: str) -> bool:
    """Whether a line has more than MOST_TOKENS; the first count is quick and also counts what stands in strings."""
    if sum(map(line.count, '",[{')) <= MOST_TOKENS:
        return False
    return next(itertools.islice(TOKEN.finditer(line), MOST_TOKENS, None), None) is not None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`. Python's parser would keep the last of two fields of one name."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in value if names.count(name) > 1)
        raise _Repeated(f"two fields are named {repeated[:60]!r}")
    return value
