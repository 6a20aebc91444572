"""vLLM's AWQ config on a CPU, with the plugin's INT4 kernel registered.

vLLM's own kernel comes first in its list and claims to support every CPU, but its AVX2 build lacks the operator. There the
plugin disables it through vLLM's variable VLLM_DISABLED_KERNELS. That happens in the first process, before the engine and the
workers start, so all processes choose the same kernel.
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
from qembed.vllm.kernels import DISABLED_KERNELS, STOCK_KERNEL

register_linear_kernel(Int4LinearKernel, PlatformEnum.CPU)


class CpuConfig(AutoAWQConfig):
    """AWQ's linear layers on a CPU: 16-bit activations, and float32 where vLLM's own kernel is disabled."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoAWQConfig:
        """vLLM's config. Disables vLLM's own kernel where its operator is missing."""
        disable_missing_kernel()
        return super().from_config(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """vLLM's method, replaced by `CpuAWQLinear` for AWQ linear layers."""
        method = super().get_quant_method(layer, prefix)
        return CpuAWQLinear(self) if type(method) is AutoAWQMarlinLinearMethod else method

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes of the activations: vLLM's own kernel has no float32."""
        return [torch.float16, torch.bfloat16, *([torch.float32] if STOCK_KERNEL in _disabled() else [])]


class CpuAWQLinear(AutoAWQMarlinLinearMethod):
    """A linear layer that gives the plugin's kernel the tensors in the checkpoint's layout.

    vLLM would convert the layout first, which takes several int32 per weight.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Convert the loaded tensors: in the plugin's kernel, or as vLLM does for its own."""
        if isinstance(self.kernel, Int4LinearKernel):
            self.kernel.process_weights_after_loading(layer)
        else:
            super().process_weights_after_loading(layer)


class CpuAWQConfig(HalfTable, CpuConfig):
    """AWQ on a CPU, with a 16-bit token table."""


class CpuInt8TableConfig(Int8TableConfig, CpuConfig):
    """AWQ on a CPU, with an INT8 token table."""


def disable_missing_kernel() -> None:
    """Disable vLLM's own kernel where its build for this CPU lacks the operator, so that vLLM chooses the plugin's."""
    if not _stock_kernel_exists() and STOCK_KERNEL not in _disabled():
        os.environ[DISABLED_KERNELS] = ",".join([*_disabled(), STOCK_KERNEL])


def _disabled() -> list[str]:
    return [name for name in os.environ.get(DISABLED_KERNELS, "").split(",") if name]


def _stock_kernel_exists() -> bool:
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")
