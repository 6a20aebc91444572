"""On the sample, whose weights are trained: each part of the quantizer brings the vectors nearer to the original's."""

from __future__ import annotations

import statistics

import pytest
import torch

from qembed.checkpoint.find import find
from qembed.quantize import stream
from qembed.quantize.calibration import built_in
from qembed.quantize.checks import shape_of
from qembed.quantize.settings import QuantizationSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lost() -> dict[str, float]:
    """Mean of (1 − cosine) on 48 texts that calibration does not see, for plain rounding, AWQ, compensation, and all."""
    sample = find("sample")
    shape, calibration = shape_of(sample, 128), built_in(sample, max_tokens=256, check=48, seed=1)
    settings = {
        "plain": QuantizationSettings(scales="none", clip=False, rounding="rtn", target="layer", last_share=0),
        "awq": QuantizationSettings(rounding="rtn", target="layer", last_share=0),
        "gptq": QuantizationSettings(target="layer", last_share=0),
        "all": QuantizationSettings(),
    }
    found = {}
    for name, chosen in settings.items():
        report = stream.quantize(sample, shape, calibration, chosen, torch.device("cpu"))
        found[name] = 1 - statistics.fmean(report.cosines)
    return found


def test_awq_has_less_error_than_plain_rounding(lost: dict[str, float]) -> None:
    assert lost["awq"] < lost["plain"], lost


def test_compensated_rounding_has_less_error_than_awq_alone(lost: dict[str, float]) -> None:
    assert lost["gptq"] < 0.9 * lost["awq"], lost


def test_fitting_to_the_original_model_has_less_error_than_compensation_alone(lost: dict[str, float]) -> None:
    assert lost["all"] < 0.8 * lost["gptq"], lost
    assert lost["all"] < 0.6 * lost["plain"], lost
