"""Small random sentence-transformers folders: each variant of what a published embedder may do with a text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from tests.checkpoints import END, write_checkpoint

HIDDEN = 128
OLD_TYPES = {kind: f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Normalize")}
NEW_TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
"""The types in modules.json before sentence-transformers 6, and since then."""
ARCHITECTURES = {"qwen3": "Qwen3Model", "qwen2": "Qwen2Model", "llama": "LlamaModel", "mistral": "MistralModel"}
DENSE = {"out_features": 64, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
WIDE = {"out_features": 160, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
PROMPTS = {"prompts": {"query": "Q: ", "passage": "P: "}, "default_prompt_name": "query"}

FEATURES: dict[str, dict[str, Any]] = {
    "mean": {"pooling": "mean"},
    "bidirectional": {"config": {"is_causal": False}},
    "dense": {"dense": [DENSE]},
    "no-normalize": {"normalize": False},
    "max-seq-length": {"transformer": {"max_seq_length": 24}},
    "lower-case": {"transformer": {"do_lower_case": True}},
    "default-prompt": {"prompts": PROMPTS},
    "new-form": {"new_form": True},
}
"""Arguments of `write_embedder`: each thing that a folder may say, by name."""


def joined(*names: str) -> dict[str, Any]:
    """Arguments of `write_embedder` for a folder with all of these FEATURES."""
    arguments: dict[str, Any] = {}
    for name in names:
        for key, value in FEATURES[name].items():
            arguments[key] = {**arguments[key], **value} if isinstance(arguments.get(key), dict) else value
    return arguments


VARIANTS: dict[str, dict[str, Any]] = {
    "last": {},
    **FEATURES,
    **{", ".join(names): joined(*names) for names in itertools.combinations(FEATURES, 2)},
    **{family: {"family": family} for family in ("qwen2", "llama", "mistral")},
    "mean, bidirectional, qwen2": {"family": "qwen2", **joined("mean", "bidirectional")},
    "mean, bidirectional, no-normalize, llama": {"family": "llama", **joined("mean", "bidirectional", "no-normalize")},
    "two dense, bidirectional": {"dense": [WIDE, DENSE], **joined("bidirectional")},
}
"""Arguments of `write_embedder`, by name: each feature, every pair of them, families, and more of them at once."""


def write_embedder(
    folder: Path,
    *,
    family: str = "qwen3",
    pooling: str = "lasttoken",
    new_form: bool = False,
    normalize: bool = True,
    normalize_config: Mapping[str, Any] | None = None,
    dense: Sequence[Mapping[str, Any]] = (),
    transformer: Mapping[str, Any] | None = None,
    prompts: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write a random model of `family` into the new `folder`, as sentence-transformers does.

    Args:
        pooling: the mode, as sentence-transformers names it.
        new_form: whether 1_Pooling/config.json and the types in modules.json are those of version 6.
        normalize: whether a Normalize module comes last.
        normalize_config: config.json of that module.
        dense: config.json of each Dense module, without in_features.
        transformer: sentence_bert_config.json.
        prompts: config_sentence_transformers.json.
        config: further values of config.json.
    """
    types = NEW_TYPES if new_form else OLD_TYPES
    write_checkpoint(folder, family, **{"architectures": [ARCHITECTURES[family]], **(config or {})})
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    kinds = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize]
    modules = [
        {"idx": idx, "name": str(idx), "path": f"{idx}_{kind}" if idx else "", "type": types[kind]}
        for idx, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling_config(pooling, new_form=new_form)))
    width = HIDDEN
    for idx, layer in enumerate(dense, 2):
        write_dense(folder / f"{idx}_Dense", {"in_features": width, **layer})
        width = layer["out_features"]
    if normalize_config is not None:
        normalizing = folder / modules[-1]["path"]
        normalizing.mkdir()
        (normalizing / "config.json").write_text(json.dumps(normalize_config))
    for name, content in (("sentence_bert_config", transformer), ("config_sentence_transformers", prompts)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return find(str(folder))


def pooling_config(mode: str, *, new_form: bool = False) -> dict[str, Any]:
    """1_Pooling/config.json."""
    if new_form:
        return {"embedding_dimension": HIDDEN, "pooling_mode": mode, "include_prompt": True}
    switches = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}
    return {
        "word_embedding_dimension": HIDDEN,
        **{f"pooling_mode_{name}": name == switches[mode] for name in switches.values()},
        "include_prompt": True,
    }


def write_dense(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a Dense module with random weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(config["out_features"])
    weights = {"linear.weight": torch.randn(config["out_features"], config["in_features"], generator=draw) / 8}
    if config["bias"]:
        weights["linear.bias"] = torch.randn(config["out_features"], generator=draw) / 4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_voyage(folder: Path, plain: Path, *, outputs: int = 96) -> Checkpoint:
    """Write a model like voyage-4-nano into `folder`: bidirectional Qwen3, a linear layer within the model, mean pooling.

    sentence-transformers reads that with the model's own code. So `plain` gets the same weights with a Dense module.
    """
    from safetensors.torch import load_file, save_file

    layer = {"out_features": outputs, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    write_embedder(plain, pooling="mean", config={"is_causal": False}, dense=[layer])
    write_embedder(
        folder,
        pooling="mean",
        config={
            "architectures": ["Qwen3ForCausalLM"],
            "auto_map": {"AutoModel": "modeling_qwen3_bidirectional.Qwen3BidirectionalModel"},
            "use_bidirectional_attention": True,
            "num_labels": outputs,
        },
    )
    tensors = {f"model.{name}": tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    tensors["linear.weight"] = load_file(plain / "2_Dense" / "model.safetensors")["linear.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return find(str(folder))


def write_texts(path: Path) -> Path:
    """Write a JSONL file of short texts to calibrate with."""
    texts = [f"{number} cats and {number * number} dogs in {'very ' * (number % 5)}old houses" for number in range(80)]
    path.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)))
    return path
