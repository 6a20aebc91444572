"""The INT4 linear layer as vLLM's kernel list knows it: takes over the loaded tensors, then multiplies."""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from qembed.serve.vllm_plugin import int4

SYMMETRIC_ZERO = 8
ZEROS = "int4_zeros"


class Int4LinearKernel(MPLinearKernel):
    """4-bit weights on any CPU that torch runs on, for AWQ (with zero points) and symmetric weights, in any float dtype."""

    @classmethod
    def get_min_capability(cls) -> int:
        """No CUDA capability is needed."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether a layer can be computed, and else why not."""
        if not current_platform.is_cpu():
            return False, "it is for CPUs"
        if c.weight_type not in (scalar_types.uint4, scalar_types.uint4b8):
            return False, f"weights of type {c.weight_type} are not 4-bit integers with an offset"
        inputs = c.partition_weight_shape[0]
        group = inputs if c.group_size == -1 else c.group_size
        if group % 2 or inputs % group or inputs % 8:
            return False, f"{inputs} inputs do not divide into whole words and groups of {c.group_size}"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the loaded tensors by `int4.Weight`'s three."""
        words, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        # The parameters say which way round they lie: AWQ comes as [K/8, N] here, compressed-tensors as [N, K/8].
        packed = words.data.T if words.input_dim == 0 else words.data
        steps = scales.data.T if scales.output_dim == 1 else scales.data
        if self.config.zero_points and self.w_zp_name is not None:
            zeros = getattr(layer, self.w_zp_name)
            offsets = int4.unpack(zeros.data.T if zeros.output_dim == 0 else zeros.data).T
        else:
            offsets = torch.full(steps.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
        weight = int4.prepare(packed, steps, offsets)
        if self.w_zp_name is not None:
            setattr(layer, self.w_zp_name, None)
        for name, tensor in ((self.w_q_name, weight.values), (self.w_s_name, weight.scales), (ZEROS, weight.zeros)):
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` [..., K] times the layer's weights: [..., N] in the dtype of `x`."""
        values, scales, _ = self._get_weight_params(layer)
        rows = torch.ops.qembed.int4_linear(x.reshape(-1, x.shape[-1]), values, scales, getattr(layer, ZEROS), bias)
        return rows.view(*x.shape[:-1], rows.shape[-1])
