"""Each step of the quantizer lowers the loss on the sample, whose weights are trained."""

from __future__ import annotations

import statistics

import pytest
import torch

from qembed.checkpoint.find import find
from qembed.quantize import layerwise
from qembed.quantize.blocks import LINEARS
from qembed.quantize.calibration import built_in
from qembed.quantize.checks import shape_of
from qembed.quantize.settings import QuantizationSettings, Report

pytestmark = pytest.mark.slow
TOKENS = 16_000
"""Half of the default calibration tokens, for half the time; the differences between the variants are as clear."""


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """The reports of plain rounding, AWQ, AWQ with GPTQ, and the default settings; cosines are of 48 held-out texts."""
    sample = find("sample")
    shape, calibration = shape_of(sample, 128), built_in(sample, max_tokens=256, check=48, seed=1, token_budget=TOKENS)
    variants = {
        "plain": QuantizationSettings(scales="none", clip=False, rounding="rtn", target="layer", last_share=0),
        "awq": QuantizationSettings(rounding="rtn", target="layer", last_share=0),
        "gptq": QuantizationSettings(target="layer", last_share=0),
        "default": QuantizationSettings(),
    }
    return {
        name: layerwise.quantize(sample, shape, calibration, settings, torch.device("cpu"))
        for name, settings in variants.items()
    }


@pytest.fixture(scope="module")
def loss(reports: dict[str, Report]) -> dict[str, float]:
    """Mean of 1 − cosine."""
    return {name: 1 - statistics.fmean(report.cosines) for name, report in reports.items()}


@pytest.mark.parametrize("linear", LINEARS)
def test_awq_has_less_output_error_than_plain_rounding(reports: dict[str, Report], linear: str) -> None:
    """AWQ minimizes the error of the layers' outputs; the vectors of 48 texts differ by more than it gains."""
    assert reports["awq"].relative_error(linear) < 0.98 * reports["plain"].relative_error(linear)


def test_gptq_rounding_has_less_error_than_awq_alone(loss: dict[str, float]) -> None:
    assert loss["gptq"] < 0.9 * loss["awq"], loss


def test_fitting_to_the_original_model_has_less_error_than_gptq_alone(loss: dict[str, float]) -> None:
    assert loss["default"] < 0.8 * loss["gptq"], loss
    assert loss["default"] < 0.6 * loss["plain"], loss
