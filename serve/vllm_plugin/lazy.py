"""A stand-in for vLLM's AWQ config that imports the real one when a checkpoint needs it.

vLLM's own module takes two seconds to import, which a server of a float16 checkpoint should not spend.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


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
