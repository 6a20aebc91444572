"""Vectors of the texts of a batch, as the loss of --refine takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qembed.checkpoint.head import Head, Layer
from qembed.errors import BadInput
from qembed.quantize.batches import plain
from qembed.quantize.hidden import text_vectors
from qembed.quantize.run import _check_settings
from qembed.quantize.settings import QuantizationSettings
from tests.embedders import write_embedder


def test_means_leave_padding_out_and_go_through_the_dense_layers() -> None:
    (batch,) = plain([[1, 2, 3, 4], [5, 6]], range(2), 100)
    hidden = torch.randn(*batch.ids.shape, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    norm = torch.linspace(0.5, 1.5, 8)
    head = Head("mean", (Layer(weight, None, "Tanh"),), normalized=False)
    scaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
    lengths = (batch.ends + 1).tolist()
    expected = torch.stack([torch.tanh(weight @ row[:length].mean(0)) for row, length in zip(scaled, lengths, strict=True)])
    torch.testing.assert_close(text_vectors(hidden, batch, norm, 1e-6, head), expected)


def test_autoawq_does_not_get_a_bidirectional_model(tmp_path: Path) -> None:
    causal = write_embedder(tmp_path / "causal")
    bidirectional = write_embedder(tmp_path / "bidirectional", config={"is_causal": False})
    settings = QuantizationSettings(engine="autoawq")
    _check_settings(settings, causal)
    with pytest.raises(BadInput, match="bidirectional"):
        _check_settings(settings, bidirectional)
