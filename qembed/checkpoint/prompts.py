"""config_sentence_transformers.json: the prompts of a model, and settings that change its vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qembed.checkpoint.files import read_json
from qembed.errors import BadInput
from qembed.text.cleaning import has_surrogate
from qembed.text.prompts import default_prompts

FILE = "config_sentence_transformers.json"
LONGEST_PROMPT = 2**16
"""Characters of a prompt."""
MODEL_TYPES = (None, "SentenceTransformer")


@dataclass(frozen=True)
class Prompts:
    """Prompt texts by name, and the name of the one for texts that no other is asked for (None: none)."""

    texts: dict[str, str]
    default: str | None = None


def read_prompts(folder: Path, *names: str | None) -> Prompts:
    """The prompts of the checkpoint in `folder`, with the `default_prompts` of a model with these `names` where it has none.

    Raises:
        BadInput: the file is damaged, a prompt cannot be used, or a setting is not supported.
    """
    path = folder / FILE
    if not path.exists():
        return Prompts(default_prompts(*names))
    config = read_json(path, folder)
    stored = config.get("prompts") or {}
    if not isinstance(stored, dict) or not all(isinstance(prompt, str | None) for prompt in stored.values()):
        raise BadInput(f"{path}: prompts are not texts by name")
    for name, prompt in stored.items():
        if prompt is None:
            continue
        if len(prompt) > LONGEST_PROMPT:
            raise BadInput(
                f"{path}: the prompt {name[:60]!r} has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} are read"
            )
        if has_surrogate(name) or has_surrogate(prompt):
            raise BadInput(f"{path}: the prompt {name[:60]!r} holds half of a surrogate pair, which is no character")
    texts = {**default_prompts(*names), **{name: prompt or "" for name, prompt in stored.items()}}
    default = config.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in texts):
        raise BadInput(f"{path}: default_prompt_name {str(default)[:60]!r} is none of the prompts {', '.join(sorted(texts))}")
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise BadInput(f"{path}: model_type {str(kind)[:60]!r} is not supported; only SentenceTransformer is")
    if (size := config.get("truncate_dim")) is not None:
        raise BadInput(
            f"{path}: truncate_dim {str(size)[:60]}: vectors that are cut by default are not supported; remove it, and ask for "
            "dimensions"
        )
    return Prompts(texts, default)
