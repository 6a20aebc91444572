"""`qembed quantize --engine autoawq` with AutoAWQ's own quantizer class: the cost of its bug on CPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from qembed.cli import main
from qembed.quantize import autoawq


def stock(on_layer: Callable[[int], None] = lambda _: None) -> Any:  # noqa: ARG001
    """AutoAWQ's quantizer class without our fix."""
    from awq.quantize.quantizer import AwqQuantizer

    return AwqQuantizer


if __name__ == "__main__":
    autoawq.fixed_quantizer = stock
    sys.argv[1:1] = ["quantize", "--json"]
    main()
