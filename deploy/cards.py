"""Which model fits on which card: the table of docs/deploy.md, from the memory plan (`python deploy/cards.py`).

The plan needs a checkpoint's config and shapes, not its values. So each model is written as a sparse file: a header, and data
that takes no space on disk. Sizes are from the models' own config.json.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.dtypes import BYTES
from qembed.checkpoint.find import find
from qembed.errors import BadInput
from qembed.sizes import gib
from qembed.vllm import devices
from qembed.vllm.kernels import Cpu
from qembed.vllm.settings import Launch, ServerSettings, resolve

MODELS = {
    "0.6B": (1024, 3072, 16, 28, 151_669, 32_768),
    "4B": (2560, 9728, 32, 36, 151_665, 40_960),
    "8B": (4096, 12288, 32, 36, 151_665, 40_960),
}
"""hidden_size, intermediate_size, num_attention_heads, num_hidden_layers, vocab_size, max_position_embeddings."""
OVERFLOWS_FLOAT16 = {"8B"}
"""Models whose original checkpoint gives NaN in float16 for some texts (https://github.com/QwenLM/Qwen3-Embedding/issues/164)."""
KV_HEADS, HEAD, GROUP = 8, 128, 128
CARDS = ("T4", "L4", "A10G")
LENGTHS = (8_192, 32_768)

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def shapes(size: str, int4: bool) -> Shapes:
    """dtype and shape of each tensor of Qwen3-Embedding-`size`."""
    hidden, mlp, heads, layers, vocabulary, _ = MODELS[size]
    tensors: Shapes = {"embed_tokens.weight": ("F16", (vocabulary, hidden)), "norm.weight": ("F16", (hidden,))}

    def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        if not int4:
            yield f"{name}.weight", ("F16", (outputs, inputs))
            return
        yield f"{name}.qweight", ("I32", (inputs, outputs // 8))
        yield f"{name}.qzeros", ("I32", (inputs // GROUP, outputs // 8))
        yield f"{name}.scales", ("F16", (inputs // GROUP, outputs))

    for layer in range(layers):
        at = f"layers.{layer}"
        for name, inputs, outputs in (
            ("self_attn.q_proj", hidden, heads * HEAD),
            ("self_attn.k_proj", hidden, KV_HEADS * HEAD),
            ("self_attn.v_proj", hidden, KV_HEADS * HEAD),
            ("self_attn.o_proj", heads * HEAD, hidden),
            ("mlp.gate_proj", hidden, mlp),
            ("mlp.up_proj", hidden, mlp),
            ("mlp.down_proj", mlp, hidden),
        ):
            tensors.update(linear(f"{at}.{name}", inputs, outputs))
        for name, width in (("self_attn.q_norm", HEAD), ("self_attn.k_norm", HEAD), ("input_layernorm", hidden)):
            tensors[f"{at}.{name}.weight"] = ("F16", (width,))
        tensors[f"{at}.post_attention_layernorm.weight"] = ("F16", (hidden,))
    return tensors


def write(size: str, int4: bool, folder: Path) -> Checkpoint:
    """Write a checkpoint into `folder` whose safetensors file is sparse: a header, then a hole."""
    hidden, mlp, heads, layers, vocabulary, positions = MODELS[size]
    config: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }
    if int4:
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        }
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, (dtype, shape) in shapes(size, int4).items():
        begin, end = end, end + BYTES[dtype]
        for length in shape:
            end += (end - begin) * (length - 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    folder.mkdir()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return find(str(folder))


def plan_for(checkpoint: Checkpoint, card: str, length: int) -> Launch:
    """The plan of `qembed serve --plan --device-memory CARD --max-model-len LENGTH`."""
    return resolve(ServerSettings(checkpoint, max_model_len=length), devices.named(card), Cpu(), 8000)


def longest(checkpoint: Checkpoint, card: str) -> str:
    """The longest text, in tokens, that fits on the card beside 31 others; "–" if not even the shortest limit does.

    A card without bfloat16 does not fit a model that overflows float16, unless `quantize` has scaled it.
    """
    target = devices.named(card)
    if not target.has_bfloat16 and not checkpoint.is_int4 and checkpoint.name in OVERFLOWS_FLOAT16:
        return "needs bfloat16"
    try:
        launch = resolve(ServerSettings(checkpoint, memory=target.free, max_num_seqs=32), target, Cpu(), 8000)
    except BadInput:
        return "–"
    return f"{launch.max_model_len:,}"


def table() -> str:
    """The table in Markdown."""
    columns = [
        "model",
        "weights",
        *(f"with {length:,} tokens" for length in LENGTHS),
        *(f"longest text on a {card}" for card in CARDS),
    ]
    lines = [" | ".join(columns), " | ".join(["---", *["---:"] * (len(columns) - 1)])]
    with tempfile.TemporaryDirectory() as folder:
        for size in MODELS:
            for int4 in (True, False):
                checkpoint = write(size, int4, Path(folder) / f"{size}{'-AWQ-INT4' if int4 else ''}")
                plans = [plan_for(checkpoint, CARDS[-1], length).plan for length in LENGTHS]
                cells = [f"{size} {'INT4' if int4 else 'FP16'}", gib(plans[0].weights), *(gib(plan.total) for plan in plans)]
                lines.append(" | ".join([*cells, *(longest(checkpoint, card) for card in CARDS)]))
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    print(table())
