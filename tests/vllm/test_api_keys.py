"""API keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from qembed.errors import BadInput
from qembed.vllm import api_keys

FIRST, SECOND = "key-number-one", "key-number-two"


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{FIRST}\n\n  {SECOND}  \n")
    assert api_keys.find(file, {"QEMBED_API_KEY": "ignored-key"}) == (FIRST, SECOND)
    file.write_bytes(f"\ufeff{FIRST}\r\n{SECOND}\r\n".encode())  # as Windows writes it
    assert api_keys.find(file, {}) == (FIRST, SECOND)
    assert api_keys.find(None, {"QEMBED_API_KEY": f"{FIRST}, {SECOND}"}) == (FIRST, SECOND)
    assert api_keys.find(None, {}) == api_keys.find(None, {"QEMBED_API_KEY": ""}) == ()


@pytest.mark.parametrize(
    ("text", "message"), [("", "no key"), ("# only\n", "no key"), ("short", "key 1"), (f"{FIRST}\na b c d e f", "key 2")]
)
def test_a_file_with_invalid_keys_is_refused_without_showing_them(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        api_keys.find(file, {})
    assert "a b c" not in str(caught.value)
    with pytest.raises(BadInput, match="cannot be read"):
        api_keys.find(tmp_path / "nothing", {})


def test_any_of_the_keys_is_accepted() -> None:
    hashes = [api_keys.hashed(FIRST), api_keys.hashed(SECOND)]
    assert api_keys.is_known(f"Bearer {FIRST}", hashes)
    assert api_keys.is_known(f"bearer {SECOND}", hashes)
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        FIRST,
        f"Basic {FIRST}",
        f"Bearer {FIRST}x",
        f"Bearer {hashes[0]}",
        "Bearer ü",
    ):
        assert not api_keys.is_known(wrong, hashes)
    assert FIRST not in str(hashes)


def test_a_world_readable_file_is_detected(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(FIRST)
    file.chmod(0o600)
    assert not api_keys.is_exposed(file)
    file.chmod(0o644)
    assert api_keys.is_exposed(file)
