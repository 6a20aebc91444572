"""Tiny random checkpoints of every supported family, and helpers that run `qembed quantize` on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.cli import group

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 257,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """A function that writes a random checkpoint (float16, one token per byte) into a folder and opens it."""

    def make(family: str = "qwen3", **options: Any) -> Checkpoint:
        return write_checkpoint(tmp_path / f"tiny-{family}", family, **options)

    return make


def write_checkpoint(
    folder: Path, family: str, *, prefix: str = "", shards: int = 1, dtype: str = "float16", **changes: Any
) -> Checkpoint:
    """Write a random checkpoint into the new `folder`; `changes` are fields of config.json."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    folder.mkdir()
    config = {**SIZES, "model_type": family, **({"head_dim": 64} if family == "qwen3" else {}), **changes}
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn_like(tensor) * 0.12 if tensor.ndim == 2 else 1 + 0.3 * torch.randn_like(tensor)
        tensors[prefix + name] = values.to(getattr(torch, dtype))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
        for shard in set(weight_map.values()):
            save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    return find(str(folder))


def _byte_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    return tokenizer


def quantize(*arguments: str | Path) -> Result:
    """Run `qembed quantize` on few, short texts."""
    fast = ["--group-size", "64", "--calibration-texts", "64", "--max-tokens", "48"]
    return CliRunner().invoke(group, ["quantize", *fast, *map(str, arguments)])


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_refused(result: Result, *words: str) -> None:
    """Assert exit code 2 and a one-line message that contains `words`."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("qembed: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]
