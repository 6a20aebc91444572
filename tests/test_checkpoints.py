"""Shared checkpoints are built once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import once_per_run


def test_a_shared_folder_is_built_once_and_again_after_a_failure(request: pytest.FixtureRequest) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        if len(calls) == 1:
            raise RuntimeError("incomplete")

    name = f"of-{request.node.name}"
    with pytest.raises(RuntimeError, match="incomplete"):
        once_per_run(request, name, build)
    folders = {once_per_run(request, name, build) for _ in range(2)}
    assert calls == [*folders] * 2
    assert calls[0].is_dir()


def test_xdist_workers_share_the_folder_of_their_run(request: pytest.FixtureRequest) -> None:
    base: Path = request.getfixturevalue("tmp_path_factory").getbasetemp()
    folder = once_per_run(request, "of-worker", Path.mkdir)
    assert folder.parent.parent == (base.parent if hasattr(request.config, "workerinput") else base)
