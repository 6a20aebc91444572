"""The last stage (`--refine`) brings vectors closer to the original's, without changing an integer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qembed.checkpoint.description import Checkpoint
from qembed.quantize import layerwise
from qembed.quantize.calibration import Calibration
from qembed.quantize.checks import shape_of
from qembed.quantize.parts import REFINED, Parts
from qembed.quantize.settings import QuantizationSettings, Report
from tests.checkpoints import MakeCheckpoint

from .conftest import quantize

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def _calibration() -> Calibration:
    draw = torch.Generator().manual_seed(0)
    rows = [[*torch.randint(0, 256, (12,), generator=draw).tolist(), 256] for _ in range(24)]
    # The held-out texts are tuning texts too: this tests that the gradient is right, not how well the result generalizes.
    return Calibration([*rows, *rows[:8]], frozenset(range(24, 32)), "test", "0" * 64, 0, 48, 0)


def _run(checkpoint: Checkpoint, folder: Path, epochs: int) -> Report:
    folder.mkdir(exist_ok=True)
    settings = QuantizationSettings(group_size=64, rounding="rtn", target="layer", refine=epochs, mixed=0, prefixes=2)
    return layerwise.quantize(checkpoint, shape_of(checkpoint, 64), _calibration(), settings, CPU, Parts(folder))


def _tensors(folder: Path, layer: str) -> dict[str, torch.Tensor]:
    part = Parts(folder).read(layer)
    assert part is not None
    return part[0]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def test_refining_lowers_the_loss_and_changes_no_integer(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3")
    before = _run(checkpoint, tmp_path / "before", 0)
    after = _run(checkpoint, tmp_path / "after", 15)
    losses = [1 - sum(report.cosines) / len(report.cosines) for report in (before, after)]
    assert losses[1] < 0.9 * losses[0]
    for layer in ("layer-000", "layer-001"):
        stored = [_tensors(tmp_path / name, layer) for name in ("before", "after")]
        changed = {name for name, tensor in stored[0].items() if not torch.equal(tensor, stored[1][name])}
        assert {name.rpartition(".")[2] for name in changed} == {"scales", "weight"}
        assert all(name.endswith((".scales", "norm.weight")) for name in changed)


def test_run_interrupted_between_layers_resumes_to_the_same_bytes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen2")
    _run(checkpoint, tmp_path / "before", 0)
    _run(checkpoint, tmp_path / "after", 3)
    interrupted = shutil.copytree(tmp_path / "after", tmp_path / "interrupted")
    shutil.copy(tmp_path / "before" / "part-layer-001.safetensors", interrupted)
    assert _bytes(interrupted) != _bytes(tmp_path / "after")
    report = _run(checkpoint, interrupted, 3)
    assert _bytes(interrupted) == _bytes(tmp_path / "after")
    assert report.cosines == _run(checkpoint, tmp_path / "after", 3).cosines


def test_command_writes_a_complete_reproducible_checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("llama").folder
    assert quantize("--model", source, "--output", tmp_path / "first", "--refine", "1").exit_code == 0
    assert not list((tmp_path / "first").rglob(f"*{REFINED}*"))
    assert quantize("--model", source, "--output", tmp_path / "second", "--refine", "1").exit_code == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("epochs", ["-1", "many"])
def test_invalid_epochs_are_refused(epochs: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    result = quantize("--model", make_checkpoint("llama").folder, "--output", tmp_path / "out", "--refine", epochs)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
