"""An output that is an input is refused by any name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qembed.command.outputs import refuse_inputs
from qembed.errors import BadInput


def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "a.csv"
    source.write_text("x")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    for name in ("a.csv", "./a.csv", "link", "hard", str(source), "../" + tmp_path.name + "/a.csv"):
        with pytest.raises(BadInput, match="would be lost"):
            refuse_inputs("-o", [Path(name)], [Path("a.csv")])
    refuse_inputs("-o", [Path("b.csv")], [Path("a.csv"), Path("none")])
