"""Shell completion of models and files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from qembed.cli import group
from qembed.command.completion import model_names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("mine-AWQ-INT4", "models/other", "plain"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("mine-AWQ-INT4", "models/other"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "hub" / "models--intfloat--e5-mistral").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_models_are_checkpoints_here_the_sample_and_hub_ids() -> None:
    assert model_names("") == ["Qwen/Qwen3-Embedding-0.6B", "intfloat/e5-mistral", "mine-AWQ-INT4", "sample"]
    assert model_names("mi") == ["mine-AWQ-INT4"]
    assert model_names("models/") == ["models/other"]
    assert model_names("./") == ["./hub/", "./mine-AWQ-INT4", "./models/", "./plain/"]
    assert model_names("int") == ["intfloat/e5-mistral"]
    assert model_names("/no/such/") == []


@pytest.mark.parametrize("command", ["quantize", "serve", "embed", "eval", "search"])
def test_the_shell_gets_them_without_heavy_imports(here: Path, command: str) -> None:
    code = (
        "import sys\n"
        "from qembed.cli import main\n"
        "sys.argv = ['qembed']\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('torch', 'numpy', 'rich') if name in sys.modules], file=sys.stderr)\n"
    )
    environment = {
        **os.environ,
        "_QEMBED_COMPLETE": "bash_complete",
        "COMP_WORDS": f"qembed {command} --model s",
        "COMP_CWORD": "3",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True)
    assert result.stdout.split() == ["plain,sample"], result.stderr
    assert result.stderr.strip() == "[]"


def test_every_parameter_that_takes_a_file_or_a_model_completes_it() -> None:
    context = click.Context(group)
    kinds: dict[str, set[str]] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            metavar = parameter.make_metavar(click.Context(command)).lstrip("[").upper()
            taken = next(
                (word for word in ("FILE", "PATH", "FOLDER", "DIRECTORY", "MODEL", "INPUT") if metavar.startswith(word)), ""
            )
            if taken or "--model" in parameter.opts:
                items = parameter.shell_complete(click.Context(command), "")
                kinds[f"{name} {parameter.opts[0]}"] = {item.type for item in items}
    assert {"eval --sts", "eval --retrieval", "eval --rerank", "quantize --calibration", "embed source"} <= kinds.keys()
    assert [name for name, types in kinds.items() if not types] == []
