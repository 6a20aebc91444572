"""Small checkpoints for tests: functions that write one into a folder, and fixtures.

A session fixture builds its checkpoint once per run, shared by pytest-xdist's workers. A test that changes a checkpoint copies
it first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.text.prompts import DEFAULT_PROMPTS

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 96,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "vocab_size": 257,
}
"""Of `fp16` and `int4`."""
FAMILY_SIZES: dict[str, Any] = {
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
"""Of `make_checkpoint`."""
RERANKER_CONTEXT = 2048
END = "<|endoftext|>"
MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def fp16(request: pytest.FixtureRequest) -> Path:
    """A tiny random Qwen3-Embedding."""
    return once_per_run(request, "tiny", write_fp16)


@pytest.fixture(scope="session")
def int4(request: pytest.FixtureRequest, fp16: Path) -> Path:
    """`fp16` rounded to AWQ INT4."""
    return once_per_run(request, "tiny-AWQ-INT4", lambda folder: write_int4(fp16, folder))


@pytest.fixture(scope="session")
def reranker(request: pytest.FixtureRequest) -> Path:
    """A tiny random reranker."""
    return once_per_run(request, "tiny-reranker", write_reranker)


@pytest.fixture(scope="session")
def converted_reranker(request: pytest.FixtureRequest, reranker: Path) -> Path:
    """`reranker` as a sequence classifier with one label."""
    return once_per_run(request, "tiny-converted", lambda folder: write_converted(reranker, folder))


@pytest.fixture(scope="session")
def int4_checkpoint(request: pytest.FixtureRequest) -> Path:
    """The sample as `qembed quantize --model sample` writes it; QEMBED_TEST_INT4 names another INT4 folder to test with."""
    folder = os.environ.get("QEMBED_TEST_INT4")
    return Path(folder).resolve() if folder else once_per_run(request, "sample-AWQ-INT4", quantize_sample)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """A function that writes a random checkpoint of a family (`write_checkpoint`) into the test's own folder and opens it."""

    def make(family: str = "qwen3", **options: Any) -> Checkpoint:
        return write_checkpoint(tmp_path / f"tiny-{family}", family, **options)

    return make


def once_per_run(request: pytest.FixtureRequest, name: str, build: Callable[[Path], object]) -> Path:
    """The folder `name` of this test run; the first caller in any worker of pytest-xdist lets `build` write it."""
    base: Path = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent  # a worker's own folder lies in that of the run
    folder = base / "checkpoints" / name
    folder.parent.mkdir(exist_ok=True)
    complete = folder.with_name(f"{name}.complete")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            build(folder)
            complete.touch()
    return folder


def write_fp16(folder: Path) -> None:
    """Write a random Qwen3-Embedding of CONFIG: float16 tensors without a `model.` prefix, one token per byte."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3Model

    folder.mkdir()
    torch.manual_seed(0)
    model = Qwen3Model(Qwen3Config(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that attention matters: with the usual 0.02 a wrong mask or position would hardly show.
            parameter.copy_(
                torch.randn_like(parameter) * 0.15 if parameter.ndim == 2 else 1 + 0.1 * torch.randn_like(parameter)
            )
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": DEFAULT_PROMPTS}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))


def write_int4(source: Path, folder: Path) -> None:
    """Write `source` rounded to the nearest of 16 levels in groups of 128, with a manifest that names `source`."""
    import torch
    from safetensors.torch import load_file, save_file

    from qembed.checkpoint.awq_layout import pack

    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        groups = tensor.float().T.unflatten(0, (-1, 128))
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        values = ((groups / scales.float()[:, None]).round() + zeros[:, None]).clamp(0, 15).flatten(0, 1)
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}qweight": pack(values), f"{stem}qzeros": pack(zeros), f"{stem}scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (folder / "qembed.json").write_text(json.dumps({"source": {"model": str(source)}}))


def write_reranker(folder: Path) -> None:
    """Write a random causal language model with RERANKER_CONTEXT positions and with tokens for yes and no."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = {**CONFIG, "vocab_size": 262, "max_position_embeddings": RERANKER_CONTEXT}
    model = Qwen3ForCausalLM(Qwen3Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 if parameter.ndim == 2 else torch.ones_like(parameter))
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))  # for vLLM


def write_converted(source: Path, folder: Path) -> None:
    """Write the reranker `source` as a sequence classifier whose row is that of yes less that of no."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    shutil.copytree(source, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    no, yes = (table[tokenizer.token_to_id(word)] for word in ("no", "yes"))
    tensors["score.weight"] = (yes - no)[None].contiguous()
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "architectures": ["Qwen3ForSequenceClassification"], **labels}
    (folder / "config.json").write_text(json.dumps(changed))


def write_checkpoint(
    folder: Path, family: str, *, prefix: str = "", shards: int = 1, dtype: str = "float16", **changes: Any
) -> Checkpoint:
    """Write a random checkpoint of a model family of transformers into the new `folder`, one token per byte.

    Args:
        prefix: before the name of every tensor.
        shards: number of files that the tensors are split into.
        changes: of FAMILY_SIZES in config.json.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    folder.mkdir()
    config = {**FAMILY_SIZES, "model_type": family, **({"head_dim": 64} if family == "qwen3" else {}), **changes}
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
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return find(str(folder))


def write_placeholder(folder: Path, config: dict[str, object]) -> Checkpoint:
    """Write a checkpoint with `config` and hardly any weights, for command lines that are planned and not run.

    Its vectors are the last token's state, scaled to unit length.
    """
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file({"embed_tokens.weight": np.zeros((10, 64), np.float16)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_modules(folder)
    return find(str(folder))


def write_modules(folder: Path) -> None:
    """Write that vectors are the last token's state, scaled to unit length, as sentence-transformers does."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    entries = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in modules]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')


def quantize_sample(folder: Path) -> None:
    """Run `qembed quantize --model sample` as a user does."""
    from tests.e2e.launcher import QEMBED

    command = [*QEMBED, "quantize", "--model", "sample", "--output", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert result.returncode == 0, result.stderr


def byte_tokenizer() -> Any:
    """A tokenizer with one token per byte, that appends END."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer
