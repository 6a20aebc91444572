"""vLLM's config of compressed-tensors checkpoints on a CPU, with the plugin's kernel among those to choose from."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

from qembed.serve.vllm_plugin.awq import replace_missing_kernel
from qembed.serve.vllm_plugin.half_table import HalfTable


class CpuCompressedTensorsConfig(HalfTable, CompressedTensorsConfig):
    """As vLLM has it, with the token table in 16 bits.

    A class of its own, because a worker imports this module, and with it the kernel, to unpickle one.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedTensorsConfig:
        """The config; switches vLLM's own kernel off where it is missing."""
        replace_missing_kernel()
        return super().from_config(config)
