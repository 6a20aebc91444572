"""vLLM's plugin: INT4 layers on any CPU and in any float dtype, and an INT8 token table.

int4_layer.py is the layer as vLLM calls it. int4_bytes.py (AVX-512 VNNI, AMX), int4_native.py (AVX2) and int4_torch.py unpack
and multiply its weights; the first two call the compiled kernels. int8_table.py and half_table.py hold the token table.
layer_cache.py replaces the KV cache, with scheduler.py and pieces.py; cpu_worker.py and gpu_worker.py bring it into vLLM.
amx.py asks Linux for the tiles that vLLM's attention uses.

vLLM calls `register` in each of its processes. That is cheap: the rest is imported only for a checkpoint whose quantization
config needs it (lazy.py).
"""

from __future__ import annotations


def register() -> None:
    """Entry point of `vllm.general_plugins`. May be called any number of times."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import current_platform

    from qembed.checkpoint.int8_table import QUANT_METHOD
    from qembed.serve.vllm_plugin import amx
    from qembed.serve.vllm_plugin.lazy import (
        COMPRESSED_TENSORS,
        LazyAWQConfig,
        LazyCompressedTensorsConfig,
        LazyInt8TableConfig,
    )

    _use_file_store()
    register_quantization_config(QUANT_METHOD)(LazyInt8TableConfig)
    if current_platform.is_cpu():
        amx.request_permission()
        register_quantization_config("awq")(LazyAWQConfig)
        register_quantization_config(COMPRESSED_TENSORS)(LazyCompressedTensorsConfig)


def _use_file_store() -> None:
    """Let a single process meet nobody through a file, as vLLM does since 0.28; before, it listens on all interfaces."""
    from vllm.utils import network_utils

    if hasattr(network_utils, "get_file_store_init_method"):
        return
    import importlib
    import tempfile
    import uuid
    from typing import Any

    executor: Any = importlib.import_module("vllm.v1.executor.uniproc_executor")
    executor.get_distributed_init_method = lambda *_: f"file://{tempfile.gettempdir()}/qembed-{uuid.uuid4().hex}"
