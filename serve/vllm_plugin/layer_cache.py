"""Keys and values of one layer at a time, in place of a KV cache.

A KV cache keeps the keys and values of all layers for later steps, in which tokens are generated. An embedder computes each
text in one step and never reads them again: a layer needs its own keys and values only while it is computed. So all layers use
the same memory. vLLM's attention works as usual, with any backend, on a cache that is as many times smaller as the model has
layers.

Texts must be computed whole: without chunked prefill and without prefix caching. `scheduler.py` sees to the size of a step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qembed.serve.vllm_plugin.pieces import compute_in_pieces

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_cache_layout import KVCacheLayout

CONFIG = "qembed"
"""The key of qembed's settings in vLLM's `additional_config`."""
STEP_TOKENS = "step_tokens"
CAUSAL = "causal"


def step_tokens(config: VllmConfig) -> int | None:
    """The usual number of tokens in a step, if `config` is for texts computed whole; otherwise None."""
    settings: Any = config.additional_config
    return settings.get(CONFIG, {}).get(STEP_TOKENS) if isinstance(settings, dict) else None


def piece_tokens(config: VllmConfig) -> int | None:
    """The number of tokens in a piece of a longer step; None if steps are computed at once, as with bidirectional attention.

    Then vLLM itself keeps no keys and values: each token attends to those of its own step.
    """
    settings: Any = config.additional_config
    causal = settings.get(CONFIG, {}).get(CAUSAL, True) if isinstance(settings, dict) else True
    return step_tokens(config) if causal else None


def shared_by_layers(config: KVCacheConfig, layout: KVCacheLayout | None) -> KVCacheConfig:
    """`config` with the keys and values of all layers in the same place, in `layout` (None: vLLM before 0.29, with one layout).

    Raises:
        ValueError: the layers need caches of different kinds.
    """
    different = ValueError("layers of different kinds cannot share their keys and values; serve with --kv-cache")
    if len(config.kv_cache_groups) != 1:
        raise different
    spec = config.kv_cache_groups[0].kv_cache_spec
    if layout is None:
        return _shared_before_layouts(config, spec.page_size_bytes * config.num_blocks, different)
    from vllm.v1.kv_cache_interface import compute_layout_strides

    if len(config.kv_cache_tensors) != 1:
        raise different
    tensor = config.kv_cache_tensors[0]
    layer_stride, block_stride, *_ = compute_layout_strides(spec, config.num_blocks, 1, layout)
    place = replace(
        tensor, size=spec.page_size_bytes * config.num_blocks, layer_stride=layer_stride, block_stride=block_stride, offset=0
    )
    return replace(config, kv_cache_tensors=[replace(place, layers=[layer]) for layer in tensor.layers])


def _shared_before_layouts(config: KVCacheConfig, size: int, different: ValueError) -> KVCacheConfig:
    """`shared_by_layers` for vLLM before 0.29, whose config has a tensor of `size` bytes a layer, which layers can share."""
    tensors: Any = config.kv_cache_tensors
    layers = [layer for tensor in tensors for layer in tensor.shared_by]
    if any(tensor.size != size or tensor.block_stride for tensor in tensors) or layers != config.kv_cache_groups[0].layer_names:
        raise different
    return replace(config, kv_cache_tensors=[replace(tensors[0], shared_by=layers)])


class LayerCacheWorker:
    """Mixin for vLLM's workers."""

    vllm_config: VllmConfig
    cache_config: Any
    model_runner: Any

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Load the model, and let it compute a long step in pieces."""
        super().load_model(*arguments, **options)  # type: ignore[misc]
        if (tokens := piece_tokens(self.vllm_config)) is not None:
            compute_in_pieces(self.model_runner, tokens)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the keys and values of one layer."""
        if piece_tokens(self.vllm_config) is not None:
            kv_cache_config = shared_by_layers(kv_cache_config, self._layout(kv_cache_config))
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]

    def _layout(self, kv_cache_config: KVCacheConfig) -> KVCacheLayout | None:
        """The order of layers, blocks, heads and tokens in memory; None before vLLM 0.29, which had one."""
        if not hasattr(kv_cache_config, "kv_cache_layout"):
            return None
        from vllm.v1.kv_cache_layout import KVCacheLayout

        name = kv_cache_config.kv_cache_layout
        return KVCacheLayout[name] if name else self.cache_config.get_resolved_kv_cache_layout()
