"""API keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from qembed.errors import BadInput
from qembed.vllm import api_keys

ONE, TWO = "key-number-one", "key-number-two"


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{ONE}\n\n  {TWO}  \n")
    assert api_keys.find(file, {"QEMBED_API_KEY": "ignored-key"}) == (ONE, TWO)
    file.write_bytes(f"\ufeff{ONE}\r\n{TWO}\r\n".encode())  # as Windows writes it
    assert api_keys.find(file, {}) == (ONE, TWO)
    assert api_keys.find(None, {"QEMBED_API_KEY": f"{ONE}, {TWO}"}) == (ONE, TWO)
    assert api_keys.find(None, {}) == api_keys.find(None, {"QEMBED_API_KEY": ""}) == ()


@pytest.mark.parametrize(
    ("text", "told"), [("", "no key"), ("# only\n", "no key"), ("short", "key 1"), (f"{ONE}\na b c d e f", "key 2")]
)
def test_a_file_without_good_keys_is_refused_without_showing_one(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(BadInput, match=told) as caught:
        api_keys.find(file, {})
    assert "a b c" not in str(caught.value)
    with pytest.raises(BadInput, match="cannot be read"):
        api_keys.find(tmp_path / "nothing", {})


def test_one_of_the_keys_opens() -> None:
    hashes = [api_keys.hashed(ONE), api_keys.hashed(TWO)]
    assert api_keys.is_known(f"Bearer {ONE}", hashes)
    assert api_keys.is_known(f"bearer {TWO}", hashes)
    for wrong in (None, "", "Bearer", "Bearer ", ONE, f"Basic {ONE}", f"Bearer {ONE}x", f"Bearer {hashes[0]}", "Bearer ü"):
        assert not api_keys.is_known(wrong, hashes)
    assert ONE not in str(hashes)


def test_a_file_that_everybody_may_read_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(ONE)
    file.chmod(0o600)
    assert not api_keys.is_exposed(file)
    file.chmod(0o644)
    assert api_keys.is_exposed(file)
