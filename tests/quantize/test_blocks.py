"""Supported and refused checkpoints; written checkpoints give the same vectors in transformers as in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.checkpoint.head import Head
from qembed.quantize import checks, layerwise
from qembed.quantize.batches import with_prefixes
from qembed.quantize.blocks import DecoderLayer, window_mask
from qembed.quantize.calibration import prepare
from qembed.quantize.calibration_texts import built_in
from qembed.quantize.hidden import Stream
from tests.checkpoints import MakeCheckpoint

from .conftest import assert_refused, quantize

pytestmark = pytest.mark.slow

LAST = Head("last", (), True)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 embedding": ("qwen3", {"dtype": "bfloat16"}),
    "qwen3 reranker, tied": ("qwen3", {"prefix": "model.", "dtype": "bfloat16"}),
    "qwen3, yarn": ("qwen3", {"rope_theta": 1e6, "rope_scaling": YARN}),
    "qwen3, sliding in the second layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2, biases": ("qwen2", {"prefix": "model.", "shards": 3}),
    "qwen2, sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "llama": ("llama", {"dtype": "float32"}),
    "llama, all biases, untied": ("llama", {"attention_bias": True, "mlp_bias": True, "prefix": "model.", "untied": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "llama, no grouped heads": ("llama", {"num_key_value_heads": 4}),
    "mistral, sliding": ("mistral", {"sliding_window": 7}),
    "mistral, other head size": ("mistral", {"head_dim": 64, "sliding_window": None}),
    "qwen3, linear rope": ("qwen3", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}),
}


def checkpoint_of(make_checkpoint: MakeCheckpoint, name: str) -> Checkpoint:
    family, options = MODELS[name]
    options = dict(options)
    if not options.pop("untied", False):
        return make_checkpoint(family, **options)
    checkpoint = make_checkpoint(family, tie_word_embeddings=False, **options)
    path = checkpoint.folder / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.randn(257, 128).half()}, path)
    return find(str(checkpoint.folder))


def last_vectors(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """The unit vector of the last token of each row, by the complete transformers model, one row at a time."""
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    return torch.nn.functional.normalize(torch.stack(states), dim=-1)


def complete_model(checkpoint: Checkpoint) -> Any:
    """The checkpoint in transformers, its packed linear layers dequantized, in float32."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModel.from_config(config).float().eval()
    stored = {name: checkpoint.tensor(name) for name in checkpoint.files if name != "lm_head.weight"}
    tensors = layerwise.dequantize_layer(stored)
    model.load_state_dict({name.removeprefix(checkpoint.prefix): tensor for name, tensor in tensors.items()})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_written_checkpoint_has_the_reported_fidelity_in_transformers(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    source = checkpoint_of(make_checkpoint, name)
    quick = ("--rounding", "rtn", "--no-clip")
    result = quantize("--model", source.folder, "--output", tmp_path / "out", "--json", *quick)
    assert result.exit_code == 0, result.output
    written = find(str(tmp_path / "out"))
    assert written.prefix == source.prefix
    assert {name for name in source.files if "_proj.weight" not in name} <= set(written.files)
    texts = prepare(built_in(64, 0), source, max_tokens=48, check=10, seed=0)
    rows = [list(texts.rows[number]) for number in texts.check]
    assert max(map(len, rows)) == 48
    before, after = last_vectors(complete_model(source), rows), last_vectors(complete_model(written), rows)
    cosines = (before * after).sum(-1)
    reported = json.loads(result.stdout)["fidelity"]
    assert reported["mean_cosine"] == pytest.approx(cosines.mean().item(), abs=2e-4)
    assert reported["min_cosine"] == pytest.approx(cosines.min().item(), abs=1e-3)
    assert cosines.mean() < 0.9999


@pytest.mark.parametrize("name", MODELS)
def test_single_blocks_compute_the_same_as_the_complete_model(make_checkpoint: MakeCheckpoint, name: str) -> None:
    checkpoint = checkpoint_of(make_checkpoint, name)
    rows = [list(range(3, 40)), [5, 6, 256], list(range(60, 180))]
    shape = checks.shape_of(checkpoint, 64)
    table = checkpoint.tensor(f"{checkpoint.prefix}embed_tokens.weight")
    stream = Stream.start(table, with_prefixes(rows, range(3), 1000, prefixes=2, last_share=0.5, seed=0))
    block = DecoderLayer(checkpoint, torch.device("cpu"))
    for layer in range(shape.layers):
        prefix = f"{checkpoint.prefix}layers.{layer}."
        names = [name for name in checkpoint.files if name.startswith(prefix)]
        block.load({name.removeprefix(prefix): checkpoint.tensor(name) for name in names}, layer)
        stream.advance(block)
    vectors = stream.vectors(checkpoint.tensor(f"{checkpoint.prefix}norm.weight").float(), 1e-6, LAST)
    torch.testing.assert_close(vectors, last_vectors(complete_model(checkpoint), sorted(rows, key=len)), rtol=1e-4, atol=1e-5)


def test_window_mask_covers_a_token_and_those_before_it() -> None:
    mask = window_mask(torch.arange(4)[None], 2)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(window_mask(torch.arange(4)[None], 4)[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())


REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model_type": "qwen3_moe"}, ("qwen3_moe", "not supported")),
    ({"model_type": "bert"}, ("bert", "not supported", "qwen3")),
    ({"model_type": None}, ("None", "not supported", "qwen3")),
    ({"quantization_config": {"quant_method": "gptq"}}, ("already quantized", "gptq")),
    ({"quantization_config": "fp8"}, ("already quantized", "fp8")),
    ({"hidden_size": -128}, ("hidden_size is -128",)),
    ({"hidden_size": "128"}, ("hidden_size is '128'",)),
    ({"num_hidden_layers": 0}, ("num_hidden_layers is 0",)),
    ({"num_hidden_layers": True}, ("num_hidden_layers is True",)),
    ({"num_hidden_layers": 10**12}, ("num_hidden_layers", "1,000,000,000,000")),
    ({"num_hidden_layers": 3}, ("layers.2.", "missing")),
    ({"num_hidden_layers": 1}, ("layers.1.", "unexpected", "qwen3")),
    ({"vocab_size": 1.5}, ("vocab_size is 1.5",)),
    ({"max_position_embeddings": "many"}, ("max_position_embeddings is 'many'",)),
    ({"rms_norm_eps": "small"}, ("rms_norm_eps is 'small'",)),
    ({"rms_norm_eps": -1}, ("rms_norm_eps is -1",)),
    ({"num_key_value_heads": 3}, ("3 key-value heads do not divide 4 heads",)),
    ({"intermediate_size": 288}, ("288 inputs", "group size 64", "--group-size 32 would fit")),
    ({"intermediate_size": 264}, ("264 inputs", "no group size fits")),
    ({"intermediate_size": 320}, ("[256, 128]", "[320, 128]")),
    ({"head_dim": 33, "num_attention_heads": 64}, ("self_attn.k_proj has 66 outputs", "multiple of 8")),
    ({"vocab_size": 200}, ("embed_tokens.weight", "[200, 128]")),
    ({"hidden_act": "nonsense"}, ("transformers rejects", "nonsense")),
    ({"rope_scaling": {"rope_type": "nonsense", "factor": 2.0}}, ("rope_scaling", "nonsense", "yarn")),
    ({"rope_scaling": {"rope_type": "llama3"}}, ("transformers rejects", "factor")),
    ({"rope_theta": "large"}, ("rope_theta is 'large'",)),
    ({"attention_bias": True}, ("q_proj.bias", "missing")),
    ({"is_causal": False, "use_sliding_window": True}, ("bidirectional", "sliding window")),
]


def test_unsupported_checkpoints_are_refused_before_anything_is_written(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, target = make_checkpoint(), tmp_path / "out"
    config = json.loads((source.folder / "config.json").read_text())
    for change, words in REFUSED:
        (source.folder / "config.json").write_text(json.dumps({**config, **change}))
        assert_refused(quantize("--model", source.folder, "--output", target), *words)
        assert not target.exists()
        assert not list(tmp_path.glob(".*"))
    for missing in ("hidden_size", "intermediate_size", "vocab_size"):
        incomplete = {key: value for key, value in config.items() if key != missing}
        (source.folder / "config.json").write_text(json.dumps(incomplete))
        assert_refused(quantize("--model", source.folder, "--output", target), f"{missing} is missing")
    for text, words in (
        ("{", ("not JSON",)),
        ("[]", ("not a JSON object",)),
        ("[" * 100_000, ("not JSON",)),
        ("", ("not JSON",)),
    ):
        (source.folder / "config.json").write_text(text)
        assert_refused(quantize("--model", source.folder, "--output", target), "config.json", *words)


def test_buffers_of_old_llama_checkpoints_are_not_stored(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("llama")
    path = source.folder / "model.safetensors"
    save_file({**load_file(path), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, path)
    assert quantize("--model", source.folder, "--output", tmp_path / "out").exit_code == 0
    assert "layers.0.self_attn.rotary_emb.inv_freq" not in find(str(tmp_path / "out")).files
