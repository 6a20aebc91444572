"""vLLM's config of compressed-tensors checkpoints on a CPU, with the plugin's INT4 kernel registered."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

from qembed.serve.vllm_plugin.awq import disable_missing_kernel
from qembed.serve.vllm_plugin.half_table import HalfTable


class CpuCompressedTensorsConfig(HalfTable, CompressedTensorsConfig):
    """vLLM's config, with a 16-bit token table.

    A worker that unpickles it imports this module, and with it awq.py, which registers the kernel. Hence a class of its own.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedTensorsConfig:
        """vLLM's config. Disables vLLM's own kernel where its operator is missing."""
        disable_missing_kernel()
        return super().from_config(config)
