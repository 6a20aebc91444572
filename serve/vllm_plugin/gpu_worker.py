"""vLLM's worker on a GPU, with `layer_cache`."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker as GpuWorker

from qembed.serve.vllm_plugin.layer_cache import LayerCacheWorker


class Worker(LayerCacheWorker, GpuWorker):
    """Named in `--worker-cls`."""
