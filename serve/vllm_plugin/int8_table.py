"""The token table in INT8 as vLLM's embedding layer: loaded from a checkpoint that has one, or made while a float one loads."""

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

MADE_FROM = "weight"


class Int8TableConfig(AutoAWQConfig):
    """AWQ linear layers beside a token table in INT8."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoAWQConfig:
        """The config.

        Raises:
            ValueError: the token table is in a form that this version does not know.
        """
        if (form := config.get("token_table")) != int8_table.INT8:
            raise ValueError(
                f"token_table {form!r} in config.json: this version of qembed's vLLM plugin knows {int8_table.INT8!r}"
            )
        return super().from_config(config)

    @classmethod
    def get_name(cls) -> Any:
        """The name in config.json."""
        return int8_table.QUANT_METHOD

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """INT8 for the token table; for all else what vLLM's AWQ has."""
        if isinstance(layer, ParallelLMHead):
            return super().get_quant_method(layer, prefix) or Head()
        if isinstance(layer, VocabParallelEmbedding):
            return Int8Embedding()
        return super().get_quant_method(layer, prefix)


class Int8Embedding(QuantizeMethodBase):
    """A `VocabParallelEmbedding` whose rows are `token_table`'s; with tensor parallelism each rank has its own rows.

    Beside the three tensors the layer has, until loading ends, an empty one under the name of a float table. If the
    checkpoint has such a table it is turned to INT8 block by block as it comes, so that no float copy is ever made of it.
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
        """The tensors, for vLLM's loaders to fill. Scales are NaN until they are loaded."""
        del input_size, output_size
        rows, width = sum(output_partition_sizes), input_size_per_partition
        unknown = float("nan")
        empty = {
            "qweight": torch.empty(rows, width, dtype=torch.int8),
            "scales": torch.full((rows, 1), unknown, dtype=torch.float32),
            "column_scales": torch.full((width,), unknown, dtype=torch.float32),
        }
        for name in TENSORS:
            parameter = Parameter(empty[name], requires_grad=False)
            layer.register_parameter(name, parameter)
            # vLLM's loader takes a rank's part of what has an output_dim, and the whole of what has none.
            by_row = {} if name == "column_scales" else {"output_dim": 0}
            set_weight_attrs(parameter, {**by_row, **extra_weight_attrs})
        made_from = Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        layer.register_parameter(MADE_FROM, made_from)
        set_weight_attrs(made_from, {"weight_loader": lambda _, table: fill(layer, table)})
        layer.output_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Drop the empty tensor, and see that a table has been loaded."""
        if layer.scales.is_meta:  # the head of a model that only pools: vLLM frees it, and calls this all the same
            return
        if hasattr(layer, MADE_FROM):
            delattr(layer, MADE_FROM)
        if layer.scales.isnan().any() or layer.column_scales.isnan().any():
            wanted = ", ".join(f"embed_tokens.{name}" for name in TENSORS)
            raise ValueError(f"the checkpoint has no token table: neither embed_tokens.{MADE_FROM} nor {wanted}")

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """The rows [..., width] of the ids `input_` [...], in the dtype that the model computes in."""
        rows = embedding(input_, layer.qweight), embedding(input_, layer.scales)
        return int8_table.dequantize(*rows, layer.column_scales).to(layer.output_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, for a model that generates: `x` [..., width] times the table, in the dtype of `x`."""
        scaled = x * layer.column_scales.to(x.dtype)
        parts = [linear(scaled, int8_table.level(block).to(x.dtype)) for block in layer.qweight.split(BLOCK_ROWS)]
        logits = torch.cat(parts, dim=-1) * layer.scales.T.to(x.dtype)
        return logits if bias is None else logits + bias


class Head(UnquantizedEmbeddingMethod):
    """The output head beside an INT8 table: as vLLM has it where it has weights of its own, else the table itself."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let the head `layer` use the table of `embed_tokens` in place of its own weights."""
        del layer.weight
        for name in TENSORS:
            layer.register_parameter(name, getattr(embed_tokens, name))
        layer.quant_method = embed_tokens.quant_method
        return layer


def fill(layer: Any, table: torch.Tensor) -> None:
    """Turn the whole float `table` [vocabulary, width] to INT8 and put the layer's part of its rows into it.

    An empty `table` is what our own checkpoints have in its place (`qembed.quantize.table`): nothing is done.
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
