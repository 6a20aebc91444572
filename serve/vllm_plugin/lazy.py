"""Stand-ins for the quantization configs that import the real ones when a checkpoint needs them.

vLLM's own module takes two seconds to import, which a server of a float16 checkpoint should not spend.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qembed.checkpoint.int8_table import QUANT_METHOD

COMPRESSED_TENSORS = "compressed-tensors"


class LazyAWQConfig(QuantizationConfig):
    """What `awq` in a checkpoint's config.json stands for on a CPU. `from_config` returns the real thing."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """vLLM's config of an AWQ checkpoint, with our kernel behind it."""
        from qembed.serve.vllm_plugin.awq import CpuAWQConfig

        return CpuAWQConfig.from_config(config)

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Where vLLM looks if config.json has no quantization_config."""
        return ["quantize_config.json", "quant_config.json"]

    @classmethod
    def get_min_capability(cls) -> int:
        """No CUDA capability is needed."""
        return -1

    def get_name(self) -> Any:
        """The name in config.json."""
        return "awq"

    def get_supported_act_dtypes(self) -> list[Any]:
        """Never asked: `from_config` returns another class."""
        raise NotImplementedError

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Never asked: `from_config` returns another class."""
        raise NotImplementedError


class LazyCompressedTensorsConfig(LazyAWQConfig):
    """The same for `compressed-tensors` (llm-compressor's checkpoints): vLLM's own config, with our kernel to choose from."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """vLLM's config of such a checkpoint, with our kernel behind it where vLLM has none."""
        from qembed.serve.vllm_plugin.compressed_tensors import CpuCompressedTensorsConfig

        return CpuCompressedTensorsConfig.from_config(config)

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """None: such a checkpoint says it in config.json."""
        return []

    def get_name(self) -> Any:
        """The name in config.json."""
        return COMPRESSED_TENSORS


class LazyInt8TableConfig(LazyAWQConfig):
    """The same for `qembed_awq`: AWQ with the token table in INT8, on any device."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """vLLM's config of an AWQ checkpoint, with an INT8 token table, and with our kernel behind it on a CPU."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            from qembed.serve.vllm_plugin.awq import CpuInt8TableConfig

            return CpuInt8TableConfig.from_config(config)
        from qembed.serve.vllm_plugin.int8_table import Int8TableConfig

        return Int8TableConfig.from_config(config)

    def get_name(self) -> Any:
        """The name in config.json."""
        return QUANT_METHOD
