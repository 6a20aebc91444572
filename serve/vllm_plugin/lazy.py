"""Quantization configs that import the real ones when a checkpoint needs them.

The real ones need a module of vLLM's that takes two seconds to import. A server of a float16 checkpoint need not wait for it.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qembed.checkpoint.int8_table import QUANT_METHOD

COMPRESSED_TENSORS = "compressed-tensors"


class LazyAWQConfig(QuantizationConfig):
    """The config of `quant_method: awq` on a CPU. `from_config` returns the real config."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """vLLM's config of an AWQ checkpoint, with the plugin's kernel."""
        from qembed.serve.vllm_plugin.awq import CpuAWQConfig

        return CpuAWQConfig.from_config(config)

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Files that vLLM reads if config.json has no quantization_config."""
        return ["quantize_config.json", "quant_config.json"]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any CUDA capability is enough."""
        return -1

    def get_name(self) -> Any:
        """The quant_method in config.json."""
        return "awq"

    def get_supported_act_dtypes(self) -> list[Any]:
        """Never called: `from_config` returns another class."""
        raise NotImplementedError

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Never called: `from_config` returns another class."""
        raise NotImplementedError


class LazyCompressedTensorsConfig(LazyAWQConfig):
    """The same for `compressed-tensors`, the format of llm-compressor's checkpoints."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """vLLM's config of such a checkpoint, with the plugin's kernel where vLLM has none."""
        from qembed.serve.vllm_plugin.compressed_tensors import CpuCompressedTensorsConfig

        return CpuCompressedTensorsConfig.from_config(config)

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """None: these checkpoints always have the config in config.json."""
        return []

    def get_name(self) -> Any:
        """The quant_method in config.json."""
        return COMPRESSED_TENSORS


class LazyInt8TableConfig(LazyAWQConfig):
    """The same for `qembed_awq`: AWQ with an INT8 token table, on any device."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """vLLM's config of an AWQ checkpoint with an INT8 token table, on a CPU with the plugin's kernel."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            from qembed.serve.vllm_plugin.awq import CpuInt8TableConfig

            return CpuInt8TableConfig.from_config(config)
        from qembed.serve.vllm_plugin.int8_table import Int8TableConfig

        return Int8TableConfig.from_config(config)

    def get_name(self) -> Any:
        """The quant_method in config.json."""
        return QUANT_METHOD
