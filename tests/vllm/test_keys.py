"""Keys that change while a server runs."""

from __future__ import annotations

from pathlib import Path

from qembed.vllm.keys import KeysInForce

FIRST, SECOND = "key-number-one", "key-number-two"


def test_a_changed_file_is_read_again_and_an_invalid_one_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"a:{FIRST}\n")
    keys = KeysInForce({FIRST: "a"}, file)
    warnings: list[str] = []
    assert not keys.renewed(warnings.append)
    file.write_text(f"a:{FIRST}\nteam:{SECOND}\n")
    assert keys.renewed(warnings.append)
    assert keys.names == {FIRST: "a", SECOND: "team"}
    for invalid in ("", "short", f"a:{FIRST}\nb:{FIRST}"):
        file.write_text(invalid)
        assert not keys.renewed(warnings.append)
        assert "stay in force" in warnings[-1]
        assert keys.names == {FIRST: "a", SECOND: "team"}
    file.unlink()
    assert not keys.renewed(warnings.append)
    assert not any(key in warning for key in (FIRST, SECOND) for warning in warnings)


def test_keys_are_read_again_on_demand(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(FIRST)
    keys = KeysInForce({FIRST: ""}, file)
    keys.expired = True
    assert keys.renewed(lambda _: None)
    assert not keys.renewed(lambda _: None)
    without_file = KeysInForce({FIRST: ""}, None)
    without_file.expired = True
    assert not without_file.renewed(lambda _: None)


def test_a_file_that_changed_while_the_server_started_is_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{SECOND}\n")
    keys = KeysInForce({FIRST: ""}, file)
    assert keys.renewed(lambda _: None)
    assert keys.names == {SECOND: ""}


def test_a_file_that_was_only_touched_is_no_change(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{FIRST}\n")
    keys = KeysInForce({FIRST: ""}, file)
    warnings: list[str] = []
    assert not keys.renewed(warnings.append)
    file.write_text(f"# a comment\n{FIRST}\n")
    assert not keys.renewed(warnings.append)
    assert warnings == []
