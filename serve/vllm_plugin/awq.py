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
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod
from vllm.platforms import PlatformEnum, current_platform

from qembed.serve.vllm_plugin.half_table import HalfTable
from qembed.serve.vllm_plugin.int4_layer import Int4LinearKernel
from qembed.serve.vllm_plugin.int8_table import Int8TableConfig

STOCK_KERNEL = "CPUWNA16LinearKernel"

register_linear_kernel(Int4LinearKernel, PlatformEnum.CPU)


class CpuConfig(AutoAWQConfig):
    """AWQ's linear layers on a CPU. Beside 16-bit activations it allows float32 where the kernel that runs is the plugin's."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoAWQConfig:
        """The config; switches vLLM's own kernel off where it is missing."""
        replace_missing_kernel()
        return super().from_config(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """As vLLM has it, but that our kernel takes AWQ's tensors as they are."""
        method = super().get_quant_method(layer, prefix)
        return CpuAWQLinear(self) if type(method) is AutoAWQMarlinLinearMethod else method

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """What the layers' inputs may be: vLLM's own kernel has no float32."""
        return [torch.float16, torch.bfloat16, *([torch.float32] if STOCK_KERNEL in _disabled() else [])]


class CpuAWQLinear(AutoAWQMarlinLinearMethod):
    """A linear layer whose tensors go to our kernel as the checkpoint has them.

    vLLM would turn them to another layout first, with several int32 for each weight at a time.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Let the kernel take over the loaded tensors."""
        if isinstance(self.kernel, Int4LinearKernel):
            self.kernel.process_weights_after_loading(layer)
        else:
            super().process_weights_after_loading(layer)


class CpuAWQConfig(HalfTable, CpuConfig):
    """AWQ on a CPU, with the token table in 16 bits."""


class CpuInt8TableConfig(Int8TableConfig, CpuConfig):
    """AWQ on a CPU, with the token table in INT8."""


def replace_missing_kernel() -> None:
    """Switch vLLM's own kernel off where its build for this CPU has none, so that ours is chosen."""
    if not _stock_kernel_exists() and STOCK_KERNEL not in _disabled():
        os.environ["VLLM_DISABLED_KERNELS"] = ",".join([*_disabled(), STOCK_KERNEL])


def _disabled() -> list[str]:
    return [name for name in os.environ.get("VLLM_DISABLED_KERNELS", "").split(",") if name]


def _stock_kernel_exists() -> bool:
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")
