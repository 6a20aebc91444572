"""vLLM's worker on a CPU, with `layer_cache`."""

from __future__ import annotations

import os

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from qembed.serve.vllm_plugin.layer_cache import LayerCacheWorker
from qembed.vllm.arguments import FORKED_THREADS


class Worker(LayerCacheWorker, CPUWorker):
    """Named in `--worker-cls`."""

    def init_device(self) -> None:
        """Set the number of threads, which vLLM itself takes from the environment of a process that it starts anew."""
        if (threads := os.environ.get(FORKED_THREADS)) is not None:
            torch.set_num_threads(int(threads))
        super().init_device()  # type: ignore[no-untyped-call]
