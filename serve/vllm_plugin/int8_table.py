"""The INT8 token table as vLLM's embedding layer: loaded as stored, or quantized while a float table loads."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.functional import embedding, linear
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import set_weight_attrs

from qembed.checkpoint import int8_table
from qembed.checkpoint.int8_table import BLOCK_ROWS, TENSORS

FLOAT_TABLE = "weight"


class Int8TableConfig(AutoAWQConfig):
    """AWQ linear layers beside an INT8 token table."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoAWQConfig:
        """vLLM's config.

        Raises:
            ValueError: this version does not know the format of the token table.
        """
        if (table_format := config.get("token_table")) != int8_table.INT8:
            raise ValueError(
                f"token_table {table_format!r} in config.json: this version of qembed's vLLM plugin knows {int8_table.INT8!r}"
            )
        return super().from_config(config)

    @classmethod
    def get_name(cls) -> Any:
        """The quant_method in config.json."""
        return int8_table.QUANT_METHOD

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """INT8 for the token table, vLLM's AWQ for all other layers."""
        if isinstance(layer, ParallelLMHead):
            return super().get_quant_method(layer, prefix) or Int8Head()
        if isinstance(layer, VocabParallelEmbedding):
            return Int8Embedding()
        return super().get_quant_method(layer, prefix)


class Int8Embedding(QuantizeMethodBase):
    """Method of a `VocabParallelEmbedding` with an INT8 table; with tensor parallelism each rank holds its own rows.

    Until loading ends, the layer also has an empty parameter with the name of a float table. Its loader quantizes a float
    table of the checkpoint block by block, so no float copy of it is made.
    """

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
        """Create the parameters for vLLM's loaders. Scales are NaN until they are loaded."""
        del input_size, output_size
        rows, width = sum(output_partition_sizes), input_size_per_partition
        nan = float("nan")
        tensors = {
            "qweight": torch.empty(rows, width, dtype=torch.int8),
            "scales": torch.full((rows, 1), nan, dtype=torch.float32),
            "column_scales": torch.full((width,), nan, dtype=torch.float32),
        }
        for name in TENSORS:
            parameter = Parameter(tensors[name], requires_grad=False)
            layer.register_parameter(name, parameter)
            # vLLM's loader takes a rank's part of a parameter with output_dim, and all of one without.
            rows_per_rank = {} if name == "column_scales" else {"output_dim": 0}
            set_weight_attrs(parameter, {**rows_per_rank, **extra_weight_attrs})
        float_table = Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        layer.register_parameter(FLOAT_TABLE, float_table)
        set_weight_attrs(float_table, {"weight_loader": lambda _, table: fill(layer, table)})
        layer.output_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Remove the empty parameter, and check that a table was loaded."""
        if layer.scales.is_meta:  # the head of a pooling model: vLLM frees it, but still calls this
            return
        if hasattr(layer, FLOAT_TABLE):
            delattr(layer, FLOAT_TABLE)
        if layer.scales.isnan().any() or layer.column_scales.isnan().any():
            names = ", ".join(f"embed_tokens.{name}" for name in TENSORS)
            raise ValueError(f"the checkpoint has no token table: neither embed_tokens.{FLOAT_TABLE} nor {names}")

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """The rows [..., width] of the ids `input_` [...], in the model's dtype."""
        rows = embedding(input_, layer.qweight), embedding(input_, layer.scales)
        return int8_table.dequantize(*rows, layer.column_scales).to(layer.output_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, for a model that generates: `x` [..., width] times the table, in the dtype of `x`."""
        scaled = x * layer.column_scales.to(x.dtype)
        parts = [linear(scaled, int8_table.level(block).to(x.dtype)) for block in layer.qweight.split(BLOCK_ROWS)]
        logits = torch.cat(parts, dim=-1) * layer.scales.T.to(x.dtype)
        return logits if bias is None else logits + bias


class Int8Head(UnquantizedEmbeddingMethod):
    """The output head beside an INT8 table: vLLM's with its own weights, or tied to the table."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let the head `layer` use the table of `embed_tokens` as its weights."""
        del layer.weight
        for name in TENSORS:
            layer.register_parameter(name, getattr(embed_tokens, name))
        layer.quant_method = embed_tokens.quant_method
        return layer


def fill(layer: Any, table: torch.Tensor) -> None:
    """Quantize the float `table` [vocabulary, width] to INT8 and load this rank's rows into `layer`.

    Does nothing for an empty `table`: qembed's own checkpoints have one in its place (`qembed.quantize.table`).
    """
    if not table.numel():
        return
    blocks, device = table.split(BLOCK_ROWS), layer.qweight.device
    columns = int8_table.column_scales(block.to(device) for block in blocks)
    layer.column_scales.data.copy_(columns)
    start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    for first in range(start, end, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, end)
        qweight, scales = int8_table.quantize(table[first:last].to(device), columns)
        layer.qweight.data[first - start : last - start] = qweight
        layer.scales.data[first - start : last - start] = scales
    layer.qweight.data[end - start :] = 0
    layer.scales.data[end - start :] = 1
