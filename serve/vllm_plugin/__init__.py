"""What vLLM lacks: AWQ INT4 on CPUs for which its own kernel does not exist, and in float32; and an INT8 token table.

vLLM calls `register` in each of its processes. It costs nothing until a checkpoint is loaded that needs one of the two: the
rest is imported by the quantization config that such a checkpoint asks for.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of `vllm.general_plugins`. May be called any number of times."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import current_platform

    from qembed.checkpoint.int8_table import QUANT_METHOD
    from qembed.serve.vllm_plugin.lazy import (
        COMPRESSED_TENSORS,
        LazyAWQConfig,
        LazyCompressedTensorsConfig,
        LazyInt8TableConfig,
    )

    register_quantization_config(QUANT_METHOD)(LazyInt8TableConfig)
    if current_platform.is_cpu():
        register_quantization_config("awq")(LazyAWQConfig)
        register_quantization_config(COMPRESSED_TENSORS)(LazyCompressedTensorsConfig)
