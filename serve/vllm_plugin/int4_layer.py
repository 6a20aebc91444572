"""The INT4 linear layer as vLLM calls it: converts the loaded tensors, then multiplies.

The arithmetic is in int4_bytes.py (compiled for AVX-512 VNNI and AMX), int4_native.py (for AVX2) and int4_torch.py (without a
compiler).
"""

from __future__ import annotations

import contextlib
import ctypes
from types import ModuleType

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from qembed.checkpoint.awq_layout import PACK
from qembed.serve.vllm_plugin import int4_bytes, int4_native, int4_torch

SYMMETRIC_ZERO = 8
ZEROS = "int4_zeros"

logger = init_logger(__name__)


class Int4LinearKernel(MPLinearKernel):
    """4-bit weights on any CPU and in any float dtype: AWQ's, which have zero points, and symmetric ones.

    Uses the compiled kernel if it supports this CPU and the group size, else torch.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        """Any CUDA capability is enough."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether a layer is supported, and if not, why."""
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
        """Replace the loaded tensors by those of the implementation's `Weight`."""
        words, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        # AWQ packs along the outputs, all other formats along the inputs.
        is_awq = words.packed_dim == words.output_dim
        group_scales = scales.data.T if scales.output_dim == 1 else scales.data
        if self.config.zero_points and self.w_zp_name is not None:
            zeros = getattr(layer, self.w_zp_name).data
            zero_points = int4_torch.unpack_awq(zeros) if is_awq else int4_torch.unpack(zeros.T).T
        else:
            zero_points = torch.full(group_scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
        read_rows = _row_reader(words.data, is_awq, words.input_dim)
        inputs, self.outputs = self.config.partition_weight_shape
        self.implementation = _implementation(inputs // group_scales.shape[1])
        weight: int4_native.Weight | int4_torch.Weight
        if self.implementation is int4_torch:
            weight = int4_torch.prepare(read_rows, group_scales, zero_points)
        else:
            weight = self.implementation.prepare(read_rows, group_scales, zero_points, inputs)
        if self.w_zp_name is not None:
            setattr(layer, self.w_zp_name, None)
        for name, tensor in ((self.w_q_name, weight.values), (self.w_s_name, weight.scales), (ZEROS, weight.zeros)):
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
        del words, scales, read_rows
        _trim_heap()

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` [..., K] times the layer's weights: [..., N] in the dtype of `x`."""
        values, scales, *_ = self._get_weight_params(layer)  # vLLM before 0.29 has g_idx too
        inputs, zeros = x.reshape(-1, x.shape[-1]), getattr(layer, ZEROS)
        if self.implementation is int4_bytes:
            rows = torch.ops.qembed.int4_bytes(inputs, values, scales, zeros, bias, self.outputs)
        elif self.implementation is int4_native:
            rows = torch.ops.qembed.int4_panels(inputs, values, scales, zeros, bias, self.outputs)
        else:
            rows = torch.ops.qembed.int4_linear(inputs, values, scales, zeros, bias)
        return rows.view(*x.shape[:-1], rows.shape[-1])


def _trim_heap() -> None:
    """Let glibc return freed memory to the system: the loaded tensors, and what the conversion took."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _row_reader(words: torch.Tensor, is_awq: bool, input_dim: int) -> int4_torch.ReadRows:
    """A function that unpacks a range of outputs from the checkpoint's packed `words`."""
    if is_awq:
        return lambda start, end: int4_torch.unpack_awq(words[:, start // PACK : end // PACK])
    by_output = words.T if input_dim == 0 else words
    return lambda start, end: int4_torch.unpack(by_output[start:end])


def _implementation(group: int) -> ModuleType:
    """The module that computes layers with groups of `group` inputs fastest on this CPU."""
    if int4_native.library() is None:
        logger.warning_once("qembed's compiled INT4 kernel is missing (no AVX2, or not built): INT4 runs in torch, slower")
        return int4_torch
    if int4_bytes.instructions() is not None and int4_bytes.chunk_of(group) is not None:
        return int4_bytes
    return int4_torch if int4_native.chunk_of(group) is None else int4_native
