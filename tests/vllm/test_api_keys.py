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
    assert api_keys.find(None, {}) == ()
    with pytest.raises(
        BadInput, match="QEMBED_API_KEY: no key in it"
    ):  # as an unset variable of a shell or of compose leaves it
        api_keys.find(None, {"QEMBED_API_KEY": ""})


def test_keys_have_names(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"team-a: {FIRST}\nteam-a:{SECOND}\n:with:a:colon\nx:with:two:colons\nplain-key\n")
    names = {FIRST: "team-a", SECOND: "team-a", "with:a:colon": "", "with:two:colons": "x", "plain-key": ""}
    assert api_keys.named(file, {}) == names
    assert api_keys.named(None, {"QEMBED_API_KEY": "a:key:with:colons"}) == {"a:key:with:colons": ""}
    for text in (f"a b:{FIRST}", f"a:{FIRST}\nb:{FIRST}", "name:short", "name:"):
        file.write_text(text)
        with pytest.raises(BadInput, match="key") as caught:
            api_keys.named(file, {})
        assert FIRST not in str(caught.value)


def test_a_replaced_file_is_noticed_also_behind_a_link(tmp_path: Path) -> None:
    for name in ("one", "two"):  # Kubernetes swaps a link to a folder
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(FIRST)
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "keys").symlink_to("data/keys")
    file = api_keys.KeyFile(tmp_path / "keys")
    assert (file.changed(), file.changed()) == (True, False)
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(tmp_path / "data")
    assert (file.changed(), file.changed()) == (True, False)
    (tmp_path / "data").unlink()
    assert not file.changed()


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
    assert api_keys.matching(f"Bearer {FIRST}", hashes) == hashes[0]
    assert api_keys.matching(f"bearer {SECOND}", hashes) == hashes[1]
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
        assert not api_keys.matching(wrong, hashes)
    assert FIRST not in str(hashes)


def test_a_file_that_others_can_read_is_detected(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(FIRST)
    file.chmod(0o600)
    assert api_keys.readers(file) is None
    file.chmod(0o640)
    assert api_keys.readers(file) == "its group"
    file.chmod(0o644)
    assert api_keys.readers(file) == "every user of this machine"
