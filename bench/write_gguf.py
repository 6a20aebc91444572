"""Write a Qwen3 checkpoint as GGUF in float16, and that in 4 bit: `python write_gguf.py CONFIG FLOAT16.SAFETENSORS FOLDER`.

Runs in the environment that `make bench-serve` creates for llama.cpp. The files have no tokenizer: llama.cpp gets
token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
REST = {"embed_tokens": "token_embd", "norm": "output_norm"}
QUANTIZED = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def main() -> None:
    """Write F16.gguf and the 4-bit files."""
    config, tensors, folder = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    half = folder / "F16.gguf"
    write(json.loads(config.read_text()), tensors, half)
    for name, kind in QUANTIZED.items():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = kind
        file = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(half).encode(), str(file).encode(), settings):
            file.unlink(missing_ok=True)
            sys.exit(f"llama.cpp could not write {file}")


def write(config: dict[str, Any], tensors: Path, file: Path) -> None:
    """Write the float16 `tensors` under llama.cpp's names; norms in float32, as its own converter does."""
    writer = gguf.GGUFWriter(str(file), "qwen3")
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_pooling_type(gguf.PoolingType.LAST)
    writer.add_tokenizer_model("no_vocab")
    with safe_open(tensors, framework="np") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no dict
            tensor = stored.get_tensor(name)
            writer.add_tensor(gguf_name(name), tensor if tensor.ndim == 2 else tensor.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """The name of a tensor in llama.cpp: "layers.3.mlp.up_proj.weight" is "blk.3.ffn_up.weight"."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{REST[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.weight"


if __name__ == "__main__":
    main()
