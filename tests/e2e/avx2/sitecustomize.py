"""With this folder on PYTHONPATH a process believes that its CPU has AVX2 and nothing newer.

vLLM then loads its AVX2 build, which has no INT4 kernel; torch, oneDNN and MKL keep to AVX2 too.
"""

import os

os.environ.update(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")

import torch.cpu

for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported"):
    setattr(torch.cpu, name, lambda: False)
