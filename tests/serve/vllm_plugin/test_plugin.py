"""What the plugin costs a vLLM that does not need it, and what loading a layer takes beside the layer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.vllm

STARTED = """
import json, sys
import vllm.platforms
import vllm.model_executor.layers.quantization
import vllm.model_executor.layers.quantization.base_config
before = set(sys.modules)
from qembed.serve.vllm_plugin import register
register()
print(json.dumps(sorted(set(sys.modules) - before)))
"""

LOADED = """
import json, re
import torch
from types import SimpleNamespace
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.scalar_type import scalar_types
from qembed.serve.vllm_plugin import native
from qembed.serve.vllm_plugin.int4_layer import Int4LinearKernel

def held(key):
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
before = held("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
kernel.process_weights_after_loading(module)
print(json.dumps({"extra": held("VmHWM") - before, "after": held("VmRSS") - before, "float32": 4 * inputs * outputs,
    "int4": inputs * outputs // 2, "compiled": kernel.compiled, "native": native.library() is not None}))
"""


def run(code: str) -> object:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_registering_imports_nothing_but_its_own_few_lines() -> None:
    """vLLM has imported by then what this test imports before: torch, its platform, its list of quantization configs."""
    assert run(STARTED) == [
        "qembed",
        "qembed.checkpoint",
        "qembed.checkpoint.int8_table",
        "qembed.serve",
        "qembed.serve.vllm_plugin",
        "qembed.serve.vllm_plugin.lazy",
    ]


def test_a_layer_is_taken_over_within_its_float32_size_and_stays_4_bit() -> None:
    """The layer that is loaded and the one made of it are both there for a moment, and never a float copy."""
    found = run(LOADED)
    assert isinstance(found, dict)
    assert found["compiled"] == found["native"]
    assert found["extra"] < found["float32"]
    assert found["after"] < found["int4"] / 4
