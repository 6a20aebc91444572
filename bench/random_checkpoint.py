"""Write a full-size checkpoint with random weights: `python bench/random_checkpoint.py 0.6B FOLDER [--layers N]`.

Speed and memory depend on shapes, not on values: a checkpoint without meaning measures both where the real one cannot be had.
Layout, tensor names and dtype (bfloat16) are those of Qwen3-Embedding; the tokenizer is the sample's, whose ids are all valid.
With `--reranker` they are those of Qwen3-Reranker, and the tokenizer has tokens for yes and no. FOLDER's name then has to have
"reranker" in it, by which qembed knows one. With `--int4` the layers' matrices are random 4-bit integers in AWQ's layout.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from qembed.checkpoint import awq_layout
from qembed.checkpoint.description import INDEX
from qembed.checkpoint.find import SAMPLE, find

SHAPES: dict[str, dict[str, int]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36},
}
DEVIATION = 0.02
"""The standard deviation of weights."""
GROUP = 128
VOCABULARY = {"0.6B": 151_669, "4B": 151_665, "8B": 151_665}


def write(
    size: str,
    folder: Path,
    layers: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
    *,
    reranker: bool = False,
    int4: bool = False,
) -> None:
    """Write a checkpoint of `size` ("0.6B", "4B", "8B"), cut to `layers` and `vocabulary` if given, one file a layer.

    Weights are normal with standard deviation 0.02, and a few input channels of each norm are large, as in trained models.
    With `int4` the layers' matrices are uniform 4-bit integers in groups of 128, of the same standard deviation.
    """
    import torch
    from safetensors.torch import save_file

    sample = find(SAMPLE)
    config: dict[str, Any] = {
        **sample.config,
        **SHAPES[size],
        "num_key_value_heads": 8,
        "vocab_size": vocabulary or VOCABULARY[size],
        "max_position_embeddings": 32_768,
        "torch_dtype": "float16" if int4 else "bfloat16",
    }
    dtype: torch.dtype = getattr(torch, config["torch_dtype"])
    if int4:
        config["quantization_config"] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
        }
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    config["max_window_layers"] = config["num_hidden_layers"]
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * DEVIATION).to(dtype)

    def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        """The tensors of a linear layer."""
        if not int4:
            return {f"{name}.weight": matrix(outputs, inputs)}
        integers = torch.randint(16, (inputs, outputs), generator=generator)
        groups = inputs // GROUP
        return {
            f"{name}.qweight": awq_layout.pack(integers),
            f"{name}.qzeros": awq_layout.pack(torch.full((groups, outputs), 8)),
            f"{name}.scales": torch.full((groups, outputs), DEVIATION / float(integers.float().std()), dtype=torch.float16),
        }

    def norm(width: int) -> torch.Tensor:
        weight = torch.rand(width, generator=generator) + 0.5
        weight[torch.randint(width, (width // 100 + 1,), generator=generator)] *= 8
        return weight.to(dtype)

    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head, heads, kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    weight_map: dict[str, str] = {}
    prefix = "model." if reranker else ""

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        tensors = {f"{prefix}{tensor}": value for tensor, value in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    save("model-rest.safetensors", {"embed_tokens.weight": matrix(config["vocab_size"], hidden), "norm.weight": norm(hidden)})
    for layer in range(config["num_hidden_layers"]):
        tensors = {
            **linear("self_attn.q_proj", heads * head, hidden),
            **linear("self_attn.k_proj", kv_heads * head, hidden),
            **linear("self_attn.v_proj", kv_heads * head, hidden),
            **linear("self_attn.o_proj", hidden, heads * head),
            "self_attn.q_norm.weight": norm(head),
            "self_attn.k_norm.weight": norm(head),
            **linear("mlp.gate_proj", mlp, hidden),
            **linear("mlp.up_proj", mlp, hidden),
            **linear("mlp.down_proj", hidden, mlp),
            "input_layernorm.weight": norm(hidden),
            "post_attention_layernorm.weight": norm(hidden),
        }
        save(f"model-layer-{layer:03d}.safetensors", {f"layers.{layer}.{name}": tensor for name, tensor in tensors.items()})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
    if reranker:
        _write_answering_tokenizer(sample.folder / "tokenizer.json", folder)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "modules.json", "config_sentence_transformers.json"):
            shutil.copyfile(sample.folder / name, folder / name)
        (folder / "1_Pooling").mkdir(exist_ok=True)
        pooling = json.loads((sample.folder / "1_Pooling" / "config.json").read_text())
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "word_embedding_dimension": hidden}))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_answering_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer `source` with a token each for yes and no, and without the last token that an embedder's appends.

    transformers' class for Qwen's tokenizers would leave out the tokens that were added.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps({**json.loads(source.read_text(encoding="utf-8")), "post_processor": None}))
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="number of layers [default: the model's own]")
    parser.add_argument("--vocabulary", type=int, help="rows of the token table [default: the model's own]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights [default: 0]")
    parser.add_argument("--reranker", action="store_true", help="a Qwen3-Reranker instead of a Qwen3-Embedding")
    parser.add_argument("--int4", action="store_true", help="4-bit integers in AWQ's layout instead of bfloat16")
    arguments = parser.parse_args()
    write(
        arguments.size,
        arguments.folder,
        arguments.layers,
        arguments.seed,
        arguments.vocabulary,
        reranker=arguments.reranker,
        int4=arguments.int4,
    )


if __name__ == "__main__":
    main()
