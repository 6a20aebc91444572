"""The memory of keys and values of layers that share it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qembed.serve.vllm_plugin.layer_cache import LayerCacheWorker, shared_by_layers

pytestmark = pytest.mark.vllm
LAYERS = ["layers.0.attn", "layers.1.attn", "layers.2.attn"]
BLOCKS = 5


def config(layouts_name: str) -> tuple[Any, Any]:
    """vLLM's KV cache config for three layers in a memory layout."""
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        compute_layout_strides,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

    layout = KVCacheLayout[layouts_name]
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=16, dtype=torch.float32)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, len(LAYERS), layout)
    tensor = KVCacheTensor(
        size=len(LAYERS) * BLOCKS * spec.page_size_bytes, layers=LAYERS, layer_stride=layer_stride, block_stride=block_stride
    )
    return KVCacheConfig(BLOCKS, [tensor], [KVCacheGroupSpec(LAYERS, spec)]), layout


@pytest.mark.parametrize("layout_name", ["LBHNC", "LBNHC", "LHBNC", "BLHNC"])
def test_all_layers_share_the_memory_of_one_layer(layout_name: str) -> None:
    from vllm.v1.worker.utils import allocate_kv_cache

    whole, layout = config(layout_name)
    separate = allocate_kv_cache(whole, torch.device("cpu"), layout)
    assert len({cache.data_ptr() for cache in separate.values()}) == len(LAYERS)
    shared = shared_by_layers(whole, layout)
    caches = allocate_kv_cache(shared, torch.device("cpu"), layout)
    assert list(caches) == LAYERS
    assert len({cache.data_ptr() for cache in caches.values()}) == 1
    first = caches[LAYERS[0]]
    assert first.shape == separate[LAYERS[0]].shape
    assert first.untyped_storage().nbytes() == BLOCKS * whole.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    first[:] = torch.arange(first.numel()).view(first.shape)
    assert first.unique().numel() == first.numel(), "two places overlap"


def test_layers_of_different_kinds_are_refused() -> None:
    whole, layout = config("LBHNC")
    whole.kv_cache_groups.append(whole.kv_cache_groups[0])
    with pytest.raises(ValueError, match="--kv-cache"):
        shared_by_layers(whole, layout)


@dataclass
class TensorBeforeLayouts:
    """`KVCacheTensor` of vLLM 0.26 to 0.28."""

    size: int
    shared_by: list[str]
    offset: int = 0
    block_stride: int = 0


@dataclass
class ConfigBeforeLayouts:
    """`KVCacheConfig` of vLLM 0.26 to 0.28."""

    num_blocks: int
    kv_cache_tensors: list[TensorBeforeLayouts]
    kv_cache_groups: list[Any]


def config_before_layouts() -> ConfigBeforeLayouts:
    group = config("LBHNC")[0].kv_cache_groups[0]
    size = BLOCKS * group.kv_cache_spec.page_size_bytes
    return ConfigBeforeLayouts(BLOCKS, [TensorBeforeLayouts(size, [layer]) for layer in LAYERS], [group])


def test_in_vllm_0_26_all_layers_share_one_tensor_of_one_layers_size() -> None:
    whole = config_before_layouts()
    (tensor,) = shared_by_layers(whole, None).kv_cache_tensors  # type: ignore[arg-type]
    assert tensor == TensorBeforeLayouts(whole.kv_cache_tensors[0].size, LAYERS)
    assert len(whole.kv_cache_tensors) == len(LAYERS), "the scheduler's own config was changed"


def test_in_vllm_0_26_layers_of_different_sizes_are_refused() -> None:
    whole = config_before_layouts()
    whole.kv_cache_tensors[1].size *= 2
    with pytest.raises(ValueError, match="--kv-cache"):
        shared_by_layers(whole, None)  # type: ignore[arg-type]


class Base:
    """A worker of vLLM that notes the config it gets."""

    vllm_config = SimpleNamespace(additional_config={"qembed": {"step_tokens": 8}})
    cache_config = SimpleNamespace()
    received: Any = None

    def initialize_from_config(self, config: Any) -> None:
        self.received = config


class Worker(LayerCacheWorker, Base):
    pass


def test_the_worker_gives_vllm_0_26_a_config_that_it_knows() -> None:
    worker = Worker()
    worker.initialize_from_config(config_before_layouts())  # type: ignore[arg-type]
    assert [tensor.shared_by for tensor in worker.received.kv_cache_tensors] == [LAYERS]


def test_the_worker_takes_the_layout_that_the_engine_has_chosen() -> None:
    worker, (whole, _) = Worker(), config("LBNHC")
    whole.kv_cache_layout = "LBNHC"
    worker.initialize_from_config(whole)
    assert [tensor.layers for tensor in worker.received.kv_cache_tensors] == [[layer] for layer in LAYERS]
