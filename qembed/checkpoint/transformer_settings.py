"""sentence_bert_config.json: how sentence-transformers tokenizes and runs the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qembed.checkpoint.files import read_json
from qembed.errors import BadInput

FILES = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the file, in the order in which sentence-transformers looks for one that is not empty."""
TASKS = (None, "feature-extraction")
OUTPUTS = (None, "token_embeddings")
MODALITIES = (None, {"text": {"method": "forward", "method_output_name": "last_hidden_state"}})
"""With a modality "message", sentence-transformers puts each text into the tokenizer's chat template."""
UNSUPPORTED = ("query_length", "document_length", "query_expansion", "processing_kwargs", "tokenizer_name_or_path")
"""Settings that change the tokens of a text, unless they are empty."""
KEYWORDS = {
    "model_args": ("attn_implementation", "torch_dtype", "dtype", "use_safetensors"),
    "model_kwargs": ("attn_implementation", "torch_dtype", "dtype", "use_safetensors"),
    "tokenizer_args": ("model_max_length", "padding_side", "use_fast"),
    "processor_kwargs": ("model_max_length", "padding_side", "use_fast"),
    "config_args": ("use_cache",),
    "config_kwargs": ("use_cache",),
}
"""Arguments of transformers that may be stored, and the names among them that change no vector but by rounding."""
MAX_LENGTH = "model_max_length"


@dataclass(frozen=True)
class TransformerSettings:
    """The longest text in tokens, and whether texts are lower-cased."""

    context: int
    lower_case: bool


def read(folder: Path, positions: int) -> TransformerSettings:
    """The settings of the checkpoint in `folder`, which has `positions`.

    As in sentence-transformers, the context is max_seq_length, or else the tokenizer's model_max_length; never more than the
    model's positions.

    Raises:
        BadInput: a file is damaged, or has a setting that is not supported.
    """
    path, config = _file(folder)
    for key in UNSUPPORTED:
        if config.get(key):
            raise BadInput(f"{path}: {key} is not supported")
    if (task := config.get("transformer_task")) not in TASKS:
        raise BadInput(f"{path}: transformer_task {str(task)[:60]!r} is not supported; supported is {TASKS[1]}")
    if (output := config.get("module_output_name")) not in OUTPUTS:
        raise BadInput(f"{path}: module_output_name {str(output)[:60]!r} is not supported; supported is {OUTPUTS[1]}")
    if (modalities := config.get("modality_config")) not in MODALITIES:
        raise BadInput(f"{path}: modality_config {str(modalities)[:120]} is not supported; supported is {MODALITIES[1]}")
    lengths: list[Any] = []
    for key, harmless in KEYWORDS.items():
        arguments = config.get(key) or {}
        if not isinstance(arguments, dict) or (unknown := sorted(str(name) for name in arguments.keys() - {*harmless})):
            raise BadInput(f"{path}: {key}: {unknown[0][:60] if isinstance(arguments, dict) else 'it'} is not supported")
        lengths.append(arguments.get(MAX_LENGTH))
    lower_case = config.get("do_lower_case", False)
    if not isinstance(lower_case, bool | None):
        raise BadInput(f"{path}: do_lower_case is {str(lower_case)[:60]!r}, neither true nor false")
    own = _length(config.get("max_seq_length"), "max_seq_length", path)
    stored = [_length(length, MAX_LENGTH, path) for length in lengths if length is not None]
    limit = next((length for length in (*stored, own) if length is not None), None)
    if limit is None:
        limit = _of_tokenizer(folder)
    return TransformerSettings(min(positions, limit or positions), bool(lower_case))


def _file(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The first file of FILES that is not empty, and what it says; empty if there is none."""
    for path in (folder / name for name in FILES):
        if path.exists() and (config := read_json(path, folder)):
            return path, config
    return folder / FILES[0], {}


def _of_tokenizer(folder: Path) -> int | None:
    """model_max_length in tokenizer_config.json; None if it has none. "No limit" is a number of thirty digits there."""
    path = folder / "tokenizer_config.json"
    return _length(read_json(path, folder).get(MAX_LENGTH), MAX_LENGTH, path) if path.exists() else None


def _length(value: Any, key: str, path: Path) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 1:
        raise BadInput(f"{path}: {key} is {str(value)[:60]!r}, not a positive number of tokens")
    return int(min(value, 2**62))
