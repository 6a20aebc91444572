"""Each step of the quantizer lowers the loss on the sample, whose weights are trained."""

from __future__ import annotations

import statistics

import pytest
import torch

from qembed.checkpoint.find import find
from qembed.quantize import layerwise
from qembed.quantize.calibration import built_in
from qembed.quantize.checks import shape_of
from qembed.quantize.settings import QuantizationSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loss() -> dict[str, float]:
    """Mean of 1 − cosine on 48 held-out texts, for plain rounding, AWQ, AWQ with GPTQ, and the default settings."""
    sample = find("sample")
    shape, calibration = shape_of(sample, 128), built_in(sample, max_tokens=256, check=48, seed=1)
    variants = {
        "plain": QuantizationSettings(scales="none", clip=False, rounding="rtn", target="layer", last_share=0),
        "awq": QuantizationSettings(rounding="rtn", target="layer", last_share=0),
        "gptq": QuantizationSettings(target="layer", last_share=0),
        "default": QuantizationSettings(),
    }
    means = {}
    for name, settings in variants.items():
        report = layerwise.quantize(sample, shape, calibration, settings, torch.device("cpu"))
        means[name] = 1 - statistics.fmean(report.cosines)
    return means


def test_awq_has_less_error_than_plain_rounding(loss: dict[str, float]) -> None:
    assert loss["awq"] < loss["plain"], loss


def test_gptq_rounding_has_less_error_than_awq_alone(loss: dict[str, float]) -> None:
    assert loss["gptq"] < 0.9 * loss["awq"], loss


def test_fitting_to_the_original_model_has_less_error_than_gptq_alone(loss: dict[str, float]) -> None:
    assert loss["default"] < 0.8 * loss["gptq"], loss
    assert loss["default"] < 0.6 * loss["plain"], loss
