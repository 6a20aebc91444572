"""The token table on a CPU in the checkpoint's 16-bit dtype; looked-up rows are converted to the model's dtype.

In float32 the table of the 0.6B would take 621 MB, more than all its INT4 layers, with no gain in precision. vLLM would also
pack a second copy for matrix products, which a pooling model never computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding, linear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from qembed.checkpoint.int8_table import BLOCK_ROWS

HALVES = (torch.float16, torch.bfloat16)


class HalfEmbedding(UnquantizedEmbeddingMethod):
    """Method of a `VocabParallelEmbedding` whose table keeps the checkpoint's dtype if it has 16 bits."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As in vLLM. For a float32 model the table is allocated only when it is loaded."""
        layer.output_dtype = params_dtype
        rows = sum(output_partition_sizes)
        if params_dtype == torch.float32:
            extra_weight_attrs["weight_loader"] = lambda _, table: fill(layer, table, rows)
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        if params_dtype == torch.float32:
            layer.weight.data = torch.empty(0, input_size_per_partition)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that a table was loaded. Packing for products is left to the first product (`apply`)."""
        if not layer.weight.is_meta and not len(layer.weight):
            raise ValueError("the checkpoint has no token table: no embed_tokens.weight")

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """The rows [..., width] of the ids `input_` [...], in the model's dtype."""
        return embedding(input_, layer.weight).to(layer.output_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, for a model that generates: `x` [..., width] times the table, in the dtype of `x`."""
        if layer.output_dtype != torch.float32:
            if not hasattr(layer, "cpu_linear"):
                super().process_weights_after_loading(layer)
            return super().apply(layer, x, bias)
        logits = torch.cat([linear(x, block.to(x.dtype)) for block in layer.weight.split(BLOCK_ROWS)], dim=-1)
        return logits if bias is None else logits + bias


class HalfHead(UnquantizedEmbeddingMethod):
    """The output head beside such a table: vLLM's with its own weights, or tied to the table."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let the head `layer` use the table of `embed_tokens` as its weights."""
        layer.output_dtype, layer.quant_method = embed_tokens.output_dtype, embed_tokens.quant_method
        return super().tie_weights(layer, embed_tokens)


class HalfTable:
    """Mixin for quantization configs: a token table that the config does not quantize stays in 16 bits."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """The config's own method, or else `HalfEmbedding` for a token table and `HalfHead` for an output head."""
        method = super().get_quant_method(layer, prefix)  # type: ignore[misc]
        if method is None and isinstance(layer, VocabParallelEmbedding):
            return HalfHead() if isinstance(layer, ParallelLMHead) else HalfEmbedding()
        return method


def fill(layer: Any, table: torch.Tensor, rows: int) -> None:
    """Load this rank's part of `table` [vocabulary, width] into `layer`, padded to `rows` rows.

    The dtype is the table's if it has 16 bits, else the model's.
    """
    start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    weight = torch.zeros(rows, table.shape[1], dtype=table.dtype if table.dtype in HALVES else layer.output_dtype)
    weight[: end - start] = table[start:end]
    layer.weight.data = weight
