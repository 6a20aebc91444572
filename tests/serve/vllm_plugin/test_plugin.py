"""The plugin's cost: imports for a vLLM that does not need it, and peak memory while a layer loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

REGISTER = """
import json, sys
import vllm.platforms
import vllm.model_executor.layers.quantization
import vllm.model_executor.layers.quantization.base_config
before = set(sys.modules)
from qembed.serve.vllm_plugin import register
register()
print(json.dumps(sorted(set(sys.modules) - before)))
"""

LOAD_LAYER = """
import json, re
import torch
from types import SimpleNamespace
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.scalar_type import scalar_types
from qembed.serve.vllm_plugin import int4_native, int4_torch
from qembed.serve.vllm_plugin.int4_layer import Int4LinearKernel

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def layer(inputs, outputs, group=128):
    config = MPLinearLayerConfig(full_weight_shape=(inputs, outputs), partition_weight_shape=(inputs, outputs),
        weight_type=scalar_types.uint4, act_type=torch.float32, group_size=group, zero_points=True)
    kernel, module = Int4LinearKernel(config, "qweight", "scales", "qzeros"), torch.nn.Module()
    tensors = {"qweight": torch.ones(inputs, outputs // 8, dtype=torch.int32),
        "scales": torch.ones(inputs // group, outputs), "qzeros": torch.ones(inputs // group, outputs // 8, dtype=torch.int32)}
    for name, tensor in tensors.items():
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        parameter.input_dim, parameter.output_dim = 0, 1
        parameter.packed_dim = None if name == "scales" else 1
        module.register_parameter(name, parameter)
    return kernel, module

small = layer(256, 256)
small[0].process_weights_after_loading(small[1])
inputs, outputs = 4096, 24576  # gate_proj and up_proj of the 8B in one
kernel, module = layer(inputs, outputs)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
kernel.process_weights_after_loading(module)
print(json.dumps({"extra": status("VmHWM") - before, "after": status("VmRSS") - before, "float32": 4 * inputs * outputs,
    "int4": inputs * outputs // 2, "compiled": kernel.implementation is not int4_torch,
    "native": int4_native.library() is not None}))
"""


def run(code: str) -> object:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(result.stdout.splitlines()[-1])


def test_registering_imports_only_a_few_small_modules() -> None:
    """Apart from what vLLM has imported by then: torch, its platform, its list of quantization configs."""
    assert run(REGISTER) == [
        "qembed",
        "qembed.checkpoint",
        "qembed.checkpoint.int8_table",
        "qembed.serve",
        "qembed.serve.vllm_plugin",
        "qembed.serve.vllm_plugin.amx",
        "qembed.serve.vllm_plugin.lazy",
    ]


def test_converting_a_layer_takes_less_than_its_float32_size() -> None:
    """For a moment the loaded and the converted tensors are both in memory, but never a float copy. The result is 4-bit."""
    sizes = run(LOAD_LAYER)
    assert isinstance(sizes, dict)
    assert sizes["compiled"] == sizes["native"]
    assert sizes["extra"] < sizes["float32"]
    assert sizes["after"] < sizes["int4"] / 4


@pytest.mark.skipif("amx_tile" not in Path("/proc/cpuinfo").read_text(), reason="no AMX here")
def test_the_plugin_asks_linux_for_amx() -> None:
    """Without the permission vLLM's attention kills the engine of an INT4 model at its first text."""
    script = (
        "import ctypes; from qembed.serve import vllm_plugin as plugin; mask = ctypes.c_uint64(); "
        "permitted = lambda: ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) or mask.value >> 18 & 1; "
        "before = permitted(); plugin.register(); print(before, permitted())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-2:] == ["0", "1"]
