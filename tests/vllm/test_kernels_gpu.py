"""What vLLM chooses on GPUs that are not here: its own selection code, with a stand-in for the card.

The table of docs/deploy.md ("What vLLM chooses on it") states these results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

CHOOSE = '''
import json, logging, sys, types
import torch
logging.disable(logging.CRITICAL)
# The platform of CUDA is imported without the library that only vLLM's build for CUDA has.
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
from vllm.platforms import cuda
from vllm.platforms.interface import DeviceCapability
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod
from vllm.model_executor.layers.quantization.utils.marlin_utils import check_marlin_supported
from vllm.scalar_type import scalar_types
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
sys.path.insert(0, "deploy")
import cards
from qembed.vllm.settings import BLOCK_SIZE

class Card(cuda.CudaPlatformBase):
    capability = DeviceCapability(7, 5)
    get_device_capability = classmethod(lambda cls, device_id=0: cls.capability)
    get_device_name = classmethod(lambda cls, device_id=0: "a card")

for backend in (AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN):
    backend.get_class()  # imported before the stand-in: their imports ask for libraries by platform
for module in list(sys.modules.values()):
    if module.__name__.startswith("vllm") and "current_platform" in vars(module):
        module.current_platform = Card()

def layers(size):
    """Inputs and outputs of each kind of linear layer as vLLM joins them."""
    hidden, mlp, heads, *_ = cards.MODELS[size]
    return [(hidden, (heads + 2 * cards.KV_HEADS) * cards.HEAD), (heads * cards.HEAD, hidden), (hidden, 2 * mlp), (mlp, hidden)]

def kernel(shape, dtype, group):
    config = MPLinearLayerConfig(full_weight_shape=shape, partition_weight_shape=shape, weight_type=scalar_types.uint4,
        act_type=dtype, group_size=group, zero_points=True)
    assert check_marlin_supported(scalar_types.uint4, group, True), "vLLM would fall back to its Triton kernel for AWQ"
    return choose_mp_linear_kernel(config).__name__

def attention(dtype, cache, kind=AttentionType.DECODER):
    config = AttentionSelectorConfig(head_size=cards.HEAD, dtype=dtype, kv_cache_dtype=cache, block_size=BLOCK_SIZE["cuda"],
        attn_type=kind)
    return [candidate.backend.name for candidate in Card.get_valid_backends(Card.capability, config)[0]]

def takes(dtype):
    try:
        Card.check_if_supports_dtype(dtype)
    except ValueError:
        return False
    return True

answers = {}
for major, minor in ((7, 5), (8, 6), (8, 9), (9, 0)):
    Card.capability = DeviceCapability(major, minor)
    for dtype in (torch.float16, torch.bfloat16):
        answers[f"{major}.{minor} {dtype}".replace("torch.", "")] = {
            "supported": takes(dtype),
            "kernels": {group: sorted({kernel(shape, dtype, group) for size in cards.MODELS for shape in layers(size)})
                for group in (32, 64, 128)},
            "attention": attention(dtype, "auto"),
            "bidirectional attention": attention(dtype, "auto", AttentionType.ENCODER_ONLY),
            "attention with fp8": attention(dtype, "fp8"),
        }
print(json.dumps(answers))
'''

COMPILE = """
import json, re, sys
from types import SimpleNamespace
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
capability, dtype = int(sys.argv[1]), sys.argv[2]
# vLLM's build for CPUs imports Triton only if it has a backend for them.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
import torch
from vllm.v1.attention.ops.triton_unified_attention import unified_attention
del triton.backends.backends["cpu"]
driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", capability, 32),
    get_current_device=lambda: 0, get_current_stream=lambda device=0: 0))
compiled, run = [], JITFunction.run
JITFunction.run = lambda kernel, *values, **options: compiled.append(run(kernel, *values, **{**options, "warmup": True}))
lengths = torch.tensor([5, 40], dtype=torch.int32)
starts = torch.tensor([0, 5, 45], dtype=torch.int32)
query = torch.zeros(45, 16, 128, dtype=getattr(torch, dtype))
cache = torch.zeros(8, 16, 8, 128, dtype=getattr(torch, dtype))
unified_attention(q=query, k=cache, v=cache, out=query, cu_seqlens_q=starts, max_seqlen_q=40, seqused_k=lengths,
    max_seqlen_k=40, softmax_scale=1.0, causal=True, window_size=(-1, -1), block_table=torch.zeros(2, 3, dtype=torch.int32),
    softcap=0, q_descale=None, k_descale=None, v_descale=None)
(kernel,) = compiled
print(json.dumps({"shared": kernel.metadata.shared, "machine_code": len(kernel.asm["cubin"]),
    "tensor_cores": bool(re.search("mma[.]sync", kernel.asm["ptx"]))}))
"""
ALLOCATE = """
import json, logging, sys
from types import SimpleNamespace
logging.disable(logging.CRITICAL)
import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.quantization.utils import marlin_utils
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
sys.path.insert(0, "deploy")
import cards

def attention(size):
    model = SimpleNamespace(get_num_attention_heads=lambda _: cards.MODELS[size][2], get_num_kv_heads=lambda _: cards.KV_HEADS,
        get_head_size=lambda: cards.HEAD, rswa_window=None)
    config = SimpleNamespace(model_config=model, parallel_config=None, speculative_config=None, scheduler_config=None,
        attention_config=None, compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            cudagraph_capture_sizes=[1, 2, 4, 8, 16, 24, 32], static_forward_context={}))
    builder = TritonAttentionMetadataBuilder(SimpleNamespace(block_size=16), [], config, torch.device("cpu"))
    return sum(value.nbytes for value in vars(builder).values() if isinstance(value, torch.Tensor))

def workspace(multiprocessors):
    marlin_utils.num_compute_units = lambda _: multiprocessors
    return marlin_utils.marlin_make_workspace_new(torch.device("cpu")).nbytes

print(json.dumps({"attention": dict(zip(cards.MODELS, map(attention, cards.MODELS))),
    "marlin": {number: workspace(number) for number in (40, 58, 80)}}))
"""
LEAST_SHARED_MEMORY = 48 * 2**10
"""Bytes that a block of threads gets on any of these cards without asking for more."""


@pytest.fixture(scope="module")
def choices() -> dict[str, Any]:
    result = subprocess.run([sys.executable, "-c", CHOOSE], capture_output=True, text=True, check=True, timeout=300)
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


CARDS = {"T4": "7.5", "A10G": "8.6", "L4": "8.9"}
DTYPES = [("7.5", "float16"), ("8.6", "float16"), ("8.6", "bfloat16"), ("8.9", "float16"), ("8.9", "bfloat16")]


@pytest.mark.parametrize(("capability", "dtype"), DTYPES)
def test_every_layer_of_all_sizes_gets_marlin(choices: dict[str, Any], capability: str, dtype: str) -> None:
    kernels = choices[f"{capability} {dtype}"]["kernels"]
    assert kernels == {group: ["MarlinLinearKernel"] for group in ("32", "64", "128")}


def test_bfloat16_is_refused_on_a_t4_only(choices: dict[str, Any]) -> None:
    assert {name: choices[f"{capability} bfloat16"]["supported"] for name, capability in CARDS.items()} == {
        "T4": False,
        "A10G": True,
        "L4": True,
    }
    assert all(choices[f"{capability} float16"]["supported"] for capability in CARDS.values())


def test_hopper_gets_machete_so_what_is_measured_there_without_more_is_not_what_the_cards_get(choices: dict[str, Any]) -> None:
    assert choices["9.0 float16"]["kernels"]["128"] == ["MacheteLinearKernel"]


def test_attention_is_triton_on_a_t4_and_flash_attention_on_later_cards(choices: dict[str, Any]) -> None:
    assert choices["7.5 float16"]["attention"][0] == "TRITON_ATTN"
    assert {choices[f"{capability} bfloat16"]["attention"][0] for capability in ("8.6", "8.9", "9.0")} == {"FLASH_ATTN"}


def test_a_bidirectional_embedder_gets_the_same_attention(choices: dict[str, Any]) -> None:
    for capability, dtype in DTYPES:
        choice = choices[f"{capability} {dtype}"]
        assert choice["bidirectional attention"][0] == choice["attention"][0]


def test_flash_attention_of_these_cards_has_no_fp8_cache(choices: dict[str, Any]) -> None:
    for capability in CARDS.values():
        assert choices[f"{capability} float16"]["attention with fp8"] == ["TRITON_ATTN"]  # FlashInfer is not installed here


def test_what_marlin_and_tritons_attention_allocate_besides_weights_and_cache() -> None:
    result = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True, timeout=300)
    allocated = json.loads(result.stdout.splitlines()[-1])
    partial_sums = {size: heads * 16 * 16 * (128 + 2) * 4 for size, heads in (("0.6B", 16), ("4B", 32), ("8B", 32))}
    assert allocated["attention"] == partial_sums  # 2.0 and 4.1 MiB, once for all layers
    assert allocated["marlin"] == {"40": 160, "58": 232, "80": 320}  # bytes a layer, by multiprocessors: T4, L4, A10G


@pytest.mark.parametrize(
    ("capability", "dtype", "tensor_cores"), [("75", "float16", False), ("86", "bfloat16", True), ("89", "bfloat16", True)]
)
def test_tritons_attention_compiles_for_every_card_and_uses_tensor_cores_on_all_but_the_t4(
    capability: str, dtype: str, tensor_cores: bool
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, capability, dtype], capture_output=True, text=True, check=True, timeout=300
    )
    kernel = json.loads(result.stdout.splitlines()[-1])
    assert kernel["tensor_cores"] == tensor_cores
    assert kernel["shared"] <= LEAST_SHARED_MEMORY
    assert kernel["machine_code"] > 0
