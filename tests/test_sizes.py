"""Memory sizes as people write and read them."""

from __future__ import annotations

import pytest

from qembed import sizes
from qembed.errors import BadInput


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3GiB", 3 * 2**30),
        ("3 gib", 3 * 2**30),
        ("3G", 3 * 2**30),
        ("3GB", 3 * 10**9),
        ("1.5MiB", 3 * 2**19),
        ("33554432", 2**25),
        ("512k", 2**19),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert sizes.parse(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "3XB", "-1GiB", "0", "1e9", "3 G B", "0.1"])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no size"):
        sizes.parse(text)


@pytest.mark.parametrize("text", ["3", "512", "1048575", "2.5"])
def test_a_small_number_needs_a_unit(text: str) -> None:
    with pytest.raises(BadInput, match=f"write {text}GiB or {text}MiB"):
        sizes.parse(text)


def test_a_size_is_shown_in_mib_below_one_gib_and_in_gib_from_there() -> None:
    assert sizes.gib(10 * 2**20) == "10 MiB"
    assert sizes.gib(3 * 2**29) == "1.5 GiB"
