"""vLLM's worker on a CPU, with `layer_cache`."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from qembed.serve.vllm_plugin.layer_cache import LayerCacheWorker


class Worker(LayerCacheWorker, CPUWorker):
    """Named in `--worker-cls`."""
