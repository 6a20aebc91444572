"""vLLM's AWQ config on a CPU, with the plugin's kernel among those to choose from.

vLLM's own kernel says of itself that it can do any CPU, and it stands first in the list. Where it cannot, because this build
has no such operator (AVX2), it is switched off by vLLM's own variable VLLM_DISABLED_KERNELS. That happens in the first
process, before the engine and the workers are started, so all of them choose alike.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.platforms import PlatformEnum, current_platform

from qembed.serve.vllm_plugin.int8_table import Int8TableConfig
from qembed.serve.vllm_plugin.kernel import Int4LinearKernel

STOCK_KERNEL = "CPUWNA16LinearKernel"

register_linear_kernel(Int4LinearKernel, PlatformEnum.CPU)


class CpuAWQConfig(AutoAWQConfig):
    """AWQ on a CPU. Beside 16-bit activations it allows float32 where the plugin's kernel is the one that runs."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoAWQConfig:
        """The config; switches vLLM's own kernel off where it is missing."""
        if not _stock_kernel_exists() and STOCK_KERNEL not in _disabled():
            os.environ["VLLM_DISABLED_KERNELS"] = ",".join([*_disabled(), STOCK_KERNEL])
        return super().from_config(config)

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """What the layers' inputs may be: vLLM's own kernel has no float32."""
        return [torch.float16, torch.bfloat16, *([torch.float32] if STOCK_KERNEL in _disabled() else [])]


class CpuInt8TableConfig(Int8TableConfig, CpuAWQConfig):
    """The same with the token table in INT8."""


def _disabled() -> list[str]:
    return [name for name in os.environ.get("VLLM_DISABLED_KERNELS", "").split(",") if name]


def _stock_kernel_exists() -> bool:
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")
