"""What vLLM lacks: AWQ INT4 on CPUs for which its own kernel does not exist, and in float32.

vLLM calls `register` in each of its processes. It costs nothing on a GPU, and on a CPU nothing until an AWQ checkpoint is
loaded: the kernel is imported by the quantization config that such a checkpoint asks for.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of `vllm.general_plugins`. May be called any number of times."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from qembed.serve.vllm_plugin.lazy import LazyAWQConfig

    register_quantization_config("awq")(LazyAWQConfig)
