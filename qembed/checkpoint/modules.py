"""The modules of a sentence-transformers folder after the transformer: pooling, dense layers, normalization.

modules.json lists them in their order. Its types have the names of sentence-transformers' classes, before version 6
`sentence_transformers.models.Pooling`, since then those of their files. Whatever changes a vector and is not known here is
refused by name: vLLM leaves modules that it does not know out without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qembed.checkpoint.files import open_tensors, read_json, read_json_value
from qembed.errors import BadInput

Pooling = Literal["last", "mean"]
MODULES = "modules.json"
TYPES = {
    "Transformer": ("models", "base.modules.transformer"),
    "Pooling": ("models", "sentence_transformer.modules.pooling"),
    "Dense": ("models", "base.modules.dense"),
    "Normalize": ("models", "base.modules.normalize", "sentence_transformer.modules.normalize"),
}
"""The kinds of modules, and the packages within sentence_transformers that may stand before them in a type."""
FOLDER = re.compile(r"[0-9]_[A-Za-z0-9_]{1,60}")
MODES = {"lasttoken": "last", "mean": "mean"}
OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The switches of 1_Pooling/config.json before sentence-transformers 6, and the names of the modes since then."""
ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "Identity",
    "torch.nn.modules.activation.Tanh": "Tanh",
    "torch.nn.modules.activation.ReLU": "ReLU",
    "torch.nn.modules.activation.GELU": "GELU",
    "torch.nn.modules.activation.SiLU": "SiLU",
    "torch.nn.modules.activation.Sigmoid": "Sigmoid",
}
"""Activation functions of dense layers that vLLM also has, and their classes in torch.nn."""
WEIGHTS = "model.safetensors"
SENTENCE = (None, "sentence_embedding")


@dataclass(frozen=True)
class Dense:
    """A dense layer behind the pooling: activation(W x + b).

    Attributes:
        name: its folder, such as "2_Dense", or for a layer within the model the name of its weight.
        inputs, outputs: W is [outputs, inputs].
        bias: whether there is a b.
        activation: a class of torch.nn, such as "Tanh".
        file: the safetensors file of its weights.
        weight: the name of W in that file; that of b ends in "bias" instead of "weight".
    """

    name: str
    inputs: int
    outputs: int
    bias: bool
    activation: str
    file: Path
    weight: str = "linear.weight"

    @property
    def tensors(self) -> dict[str, list[int]]:
        """The shape of each of its tensors, by the name in its file."""
        bias = {self.weight.removesuffix("weight") + "bias": [self.outputs]} if self.bias else {}
        return {self.weight: [self.outputs, self.inputs], **bias}


@dataclass(frozen=True)
class Modules:
    """What follows the transformer."""

    pooling: Pooling
    dense: tuple[Dense, ...]
    normalized: bool


def read_modules(folder: Path, hidden_size: int) -> Modules | None:
    """The modules of the checkpoint in `folder`, whose transformer has states of `hidden_size`; None without modules.json.

    Raises:
        BadInput: a module is unknown, missing or damaged, or in a place where it cannot be computed, or modules.json is missing
            beside folders of modules.
    """
    path = folder / MODULES
    if not path.exists():
        if unlisted := sorted(module.name for module in folder.iterdir() if FOLDER.fullmatch(module.name) and module.is_dir()):
            raise BadInput(f"{path} is missing, but there is {unlisted[0]}: nothing says in which order modules come")
        return None
    entries = _entries(path, folder)
    kinds = [kind for kind, _ in entries]
    if kinds[0] != "Transformer" or kinds.count("Transformer") > 1 or entries[0][1]:
        raise BadInput(f"{path}: the first module, and only that, must be a Transformer in the folder itself")
    if kinds.count("Pooling") != 1 or kinds[1] != "Pooling":
        raise BadInput(f"{path}: modules are {', '.join(kinds)}; after the Transformer must come one Pooling")
    if "Normalize" in kinds and set(kinds[kinds.index("Normalize") :]) != {"Normalize"}:
        raise BadInput(f"{path}: modules are {', '.join(kinds)}; after Normalize no other module is supported")
    dense: list[Dense] = []
    width = hidden_size
    for kind, name in entries:
        if kind == "Dense":
            dense.append(_dense(folder, name, width))
            width = dense[-1].outputs
        elif kind == "Normalize":
            _check_normalize(folder, name)
    return Modules(_pooling(folder, entries[1][1], hidden_size), tuple(dense), "Normalize" in kinds)


def _entries(path: Path, folder: Path) -> list[tuple[str, str]]:
    """Kind and folder name of each module in modules.json."""
    content = read_json_value(path, folder)
    if not isinstance(content, list) or not content:
        raise BadInput(f"{path}: not a list of modules")
    entries: list[tuple[str, str]] = []
    names: set[str] = set()
    for entry in content:
        values = entry if isinstance(entry, dict) else {}
        type_, name = values.get("type"), values.get("path")
        if not isinstance(type_, str) or not isinstance(name, str):
            raise BadInput(f"{path}: a module has no type and path")
        kind = _kind(type_)
        if kind is None:
            raise BadInput(f"{path}: module {type_[:120]!r} is not supported; supported are {', '.join(TYPES)}")
        if kind != "Transformer" and not FOLDER.fullmatch(name):
            raise BadInput(f"{path}: the path {name[:60]!r} of {kind} is not of the form 1_{kind}")
        if (key := str(values.get("name", len(entries)))) in names or name in {path for _, path in entries}:
            raise BadInput(f"{path}: two modules have the name {key[:60]!r} or the path {name!r}")
        names.add(key)
        entries.append((kind, name))
    return entries


def _kind(type_: str) -> str | None:
    for kind, packages in TYPES.items():
        if type_ in {f"sentence_transformers.{package}.{kind}" for package in packages}:
            return kind
    return None


def _pooling(folder: Path, name: str, hidden_size: int) -> Pooling:
    path = folder / name / "config.json"
    config = read_json(path, folder)
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else mode
    if mode is None:
        modes = [new for old, new in OLD_MODES.items() if config.get(old)]
        if unknown := [key for key in config if key.startswith("pooling_mode_") and key not in OLD_MODES and config[key]]:
            raise BadInput(f"{path}: {unknown[0]} is not supported; supported are {_listed(MODES)}")
        modes = modes or ["mean"]  # as sentence-transformers
    if not isinstance(modes, Sequence) or not modes or not all(isinstance(mode, str) for mode in modes):
        raise BadInput(f"{path}: pooling_mode is no name of a mode")
    if len(modes) > 1:
        raise BadInput(f"{path}: pools in several modes ({', '.join(modes)}), whose vectors are joined; only one is supported")
    if modes[0] not in MODES:
        raise BadInput(f"{path}: pooling mode {modes[0][:60]!r} is not supported; supported are {_listed(MODES)}")
    if config.get("include_prompt", True) is not True:
        raise BadInput(f"{path}: include_prompt is {config['include_prompt']!r}: pooling without the prompt is not supported")
    width = config.get("embedding_dimension", config.get("word_embedding_dimension", hidden_size))
    if width != hidden_size:
        raise BadInput(f"{path}: pools vectors of {width} numbers, config.json says hidden_size {hidden_size}")
    return "last" if modes[0] == "lasttoken" else "mean"


def _dense(folder: Path, name: str, width: int) -> Dense:
    path = folder / name / "config.json"
    config = read_json(path, folder)
    sizes = config.get("in_features"), config.get("out_features")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise BadInput(f"{path}: in_features and out_features are {sizes[0]!r} and {sizes[1]!r}, not positive integers")
    inputs, outputs = (int(size) for size in sizes if size)
    if inputs != width:
        raise BadInput(f"{path}: in_features is {inputs}, but the vectors before it have {width} numbers")
    activation = config.get("activation_function")
    if activation not in ACTIVATIONS:
        shown = "missing" if activation is None else f"{str(activation)[:80]!r}, which is not supported"
        raise BadInput(f"{path}: activation_function is {shown}; supported are {_listed(ACTIVATIONS.values())}")
    bias = config.get("bias", True)
    if not isinstance(bias, bool):
        raise BadInput(f"{path}: bias is {bias!r}, neither true nor false")
    if config.get("use_residual", False) is not False:
        raise BadInput(f"{path}: use_residual is not supported")
    _check_sentence(config, path)
    weights = folder / name / WEIGHTS
    if not weights.exists():
        raise BadInput(f"{folder / name}: {WEIGHTS} is missing; the weights of a Dense module are only read from safetensors")
    layer = Dense(name, inputs, outputs, bias, ACTIVATIONS[activation], weights)
    _check_tensors(layer)
    return layer


def _check_tensors(layer: Dense) -> None:
    """Refuse weights whose names, shapes or types are not those of the layer."""
    with open_tensors(layer.file, "np") as tensors:
        stored = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - a safetensors handle is no dict
        shapes = {key: (view.get_shape(), view.get_dtype()) for key, view in stored.items()}
    for key, shape in layer.tensors.items():
        if key not in shapes:
            raise BadInput(f"{layer.file}: tensor {key} is missing")
        if shapes[key][0] != shape:
            raise BadInput(f"{layer.file}: tensor {key} has shape {shapes[key][0]}, {layer.name}/config.json says {shape}")
        if shapes[key][1] not in ("F16", "BF16", "F32"):
            raise BadInput(f"{layer.file}: tensor {key} is {shapes[key][1]}; supported are F16, BF16, F32")
    if unknown := sorted(shapes.keys() - layer.tensors.keys()):
        raise BadInput(f"{layer.file}: tensor {unknown[0]} is unexpected in a Dense module by {layer.name}/config.json")


def _check_normalize(folder: Path, name: str) -> None:
    path = folder / name / "config.json"
    if path.exists():
        config = read_json(path, folder)
        _check_sentence(config, path)
        if config.get("normalize_embeddings", True) is not True:  # in models saved before sentence-transformers 6
            raise BadInput(
                f"{path}: normalize_embeddings is {str(config['normalize_embeddings'])[:60]!r}; only true is supported"
            )


def _check_sentence(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a module that reads or writes anything but the text's vector."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in SENTENCE:
            raise BadInput(f"{path}: {key} is {str(config[key])[:60]!r}; only modules of the text's vector are supported")


def _listed(names: Any) -> str:
    return ", ".join(names)
