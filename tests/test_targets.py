"""A command never overwrites its input, under any name, and no other file without --force."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qembed.errors import BadInput
from qembed.search import store
from qembed.targets import Target, check_folder, check_targets, is_same_file


def refused(*paths: Path, inputs: tuple[Path, ...] = (), force: bool = True) -> str:
    with pytest.raises(BadInput) as error:
        check_targets([Target(path) for path in paths], inputs, force=force)
    return str(error.value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "in.txt"
    path.parent.mkdir()
    path.write_text("mine")
    return path


def test_an_input_is_no_target_by_any_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hard, soft, folder = (source.parents[1] / name for name in ("hard.txt", "soft.txt", "link"))
    os.link(source, hard)
    soft.symlink_to(source)
    folder.symlink_to(source.parent)
    monkeypatch.chdir(source.parent)
    for name in (source, Path("in.txt"), Path("./in.txt"), Path("../folder/in.txt"), hard, soft, folder / "in.txt"):
        assert "is the input" in refused(name, inputs=(source,))
        assert "is the input" in refused(name, inputs=(source,), force=False)


def test_a_file_of_an_input_folder_is_no_target_but_a_new_one_is(source: Path) -> None:
    deep = source.parent / "a" / "b.txt"
    deep.parent.mkdir()
    deep.touch()
    assert "belongs to the input" in refused(deep, inputs=(source.parent,))
    check_targets([Target(source.with_name("new.txt"))], [source.parent], force=False)


def test_targets_do_not_coincide(source: Path) -> None:
    folder = source.parents[1] / "link"
    folder.symlink_to(source.parent)
    new = source.with_name("v.npy")
    assert "same file" in refused(new, new)
    assert "same file" in refused(new, folder / "v.npy")
    assert "same file" in refused(new, source.with_name("V.npy"))
    assert "--output and --rejects" in _rejects_refused(new)
    check_targets([Target(new), Target(source.with_name("w.npy"))], force=False)


def _rejects_refused(path: Path) -> str:
    with pytest.raises(BadInput) as error:
        check_targets([Target(path), Target(path, "--rejects")], force=True)
    return str(error.value)


def test_only_new_and_regular_files_are_targets(source: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert "device" in refused(Path("/dev/null"))
    assert "pipe" in refused(tmp_path / "fifo")
    assert "leads to no file" in refused(tmp_path / "nowhere")
    assert "a folder" in refused(tmp_path)
    assert "no folder" in refused(tmp_path / "none" / "out.npy")
    assert "exists already" in refused(source, force=False)
    assert "--force" in refused(source, force=False)
    check_targets([Target(source)], force=True)


def test_a_folder_as_target_is_apart_from_the_inputs(source: Path) -> None:
    for folder, words in ((source.parent, "contains"), (source.parent.parent, "contains"), (source, "is the input")):
        with pytest.raises(BadInput, match=words):
            check_folder(folder, [source])
    with pytest.raises(BadInput, match="is the input"):
        check_folder(source.parent / ".", [source.parent])
    with pytest.raises(BadInput, match="is inside"):
        check_folder(source.parent / "new" / "out", [source.parent])
    check_folder(source.parent.parent / "out", [source.parent, source])


def test_new_files_are_compared_by_folder_and_name(tmp_path: Path) -> None:
    assert is_same_file(tmp_path / "é.npy", tmp_path / "e\u0301.npy")
    assert not is_same_file(tmp_path / "a.npy", tmp_path / "b.npy")
    assert not is_same_file(tmp_path / "none" / "a.npy", tmp_path / "a.npy")


@pytest.mark.parametrize("name", [".", "./", "..", "new/..", "/"])
def test_a_folder_without_a_name_of_its_own_is_no_target(name: str) -> None:
    with pytest.raises(BadInput, match=r"--output .*name"):
        check_folder(Path(name), [])


def test_an_index_named_by_a_folder_is_refused_with_its_ids() -> None:
    output = Path()
    assert "a folder" in refused(output, store.ids_path(output))
