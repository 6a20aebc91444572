"""The reference embedder against transformers' own loading, single texts, and INT4 dequantized by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.errors import BadInput
from qembed.vectors import reference, sources

TEXTS = [
    "a",
    "The cat sat on the mat.",
    "Der Zug nach Köln fährt um 7:52 Uhr ab.",
    "x = [i ** 2 for i in range(9)]",
    "ab",
    "猫",
]
# AutoAWQ's order of the eight outputs in an int32, from the low end; written out, not taken from the tested code.
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def own_vectors(folder: Path, texts: list[str]) -> np.ndarray:
    """The vectors of `texts` by AutoModel.from_pretrained, one by one; only the tokenizer is loaded by qembed."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).float().eval()
    tokenizer = find(str(folder)).tokenizer()
    vectors = []
    with torch.inference_mode():
        for text in texts:
            last = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, -1].numpy()
            vectors.append(last / np.linalg.norm(last))
    return np.stack(vectors)


def by_hand(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The dequantized weight [N, K], nibble by nibble."""
    inputs, outputs = qweight.shape[0], scales.shape[1]
    group = inputs // scales.shape[0]
    columns = []
    for output in range(outputs):
        shift = 4 * NIBBLES.index(output % 8)
        values = (qweight[:, output // 8].to(torch.int64) % 2**32) // 2**shift % 16
        zeros = (qzeros[:, output // 8].to(torch.int64) % 2**32) // 2**shift % 16
        columns.append((values - zeros.repeat_interleave(group)) * scales[:, output].float().repeat_interleave(group))
    return torch.stack(columns)


def copy_with(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Checkpoint:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint("copy", target)


def test_vectors_of_fp16_equal_those_of_transformers(fp16: Path) -> None:
    vectors = reference.embed(reference.load(find(str(fp16))), TEXTS)
    assert vectors.shape == (len(TEXTS), 128)
    assert vectors.dtype == np.float32
    assert np.abs(vectors - own_vectors(fp16, TEXTS)).max() < 2e-6
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("token_budget", [1, 30, 60, 10_000])
def test_batches_do_not_change_a_vector(fp16: Path, token_budget: int) -> None:
    loaded = reference.load(find(str(fp16)))
    progress: list[int] = []
    batched = reference.embed(loaded, TEXTS, token_budget=token_budget, on_done=progress.append)
    singly = np.concatenate([reference.embed(loaded, [text]) for text in TEXTS])
    assert np.abs(batched - singly).max() < 2e-6
    assert sum(progress) == len(TEXTS)


def test_the_appended_last_token_is_pooled(fp16: Path) -> None:
    loaded = reference.load(find(str(fp16)))
    ids = loaded.tokenizer.encode("cat").ids
    assert ids[-1] == loaded.tokenizer.token_to_id("<|endoftext|>")
    with torch.inference_mode():
        hidden = loaded.model(torch.tensor([ids])).last_hidden_state[0]
    vector = reference.embed(loaded, ["cat"])[0]
    assert vector @ torch.nn.functional.normalize(hidden[-1], dim=0).numpy() == pytest.approx(1, abs=1e-5)
    assert vector @ torch.nn.functional.normalize(hidden[-2], dim=0).numpy() < 0.99


def test_packed_weights_are_read_as_the_format_defines(int4: Path) -> None:
    packed = load_file(int4 / "model.safetensors")
    tensors = dict(reference.weights(find(str(int4))))
    name = "layers.1.mlp.down_proj"
    expected = by_hand(*(packed[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")))
    assert torch.equal(tensors[f"{name}.weight"], expected)
    assert tensors[f"{name}.weight"].shape == (128, 256)
    assert not [key for key in tensors if key.endswith(("qweight", "qzeros", "scales"))]


def test_vectors_of_int4_equal_those_of_transformers_with_dequantized_weights(int4: Path, tmp_path: Path) -> None:
    def unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        plain = {name: tensor.float() for name, tensor in tensors.items() if "_proj." not in name}
        for name in tensors:
            if name.endswith(".qweight"):
                stem = name.removesuffix("qweight")
                plain[f"{stem}weight"] = by_hand(*(tensors[stem + part] for part in ("qweight", "qzeros", "scales")))
        return plain

    plain = copy_with(int4, tmp_path / "plain", unpacked)
    config = {name: value for name, value in plain.config.items() if name != "quantization_config"}
    (plain.folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    vectors = reference.embed(reference.load(find(str(int4))), TEXTS)
    assert np.abs(vectors - own_vectors(plain.folder, TEXTS)).max() < 2e-6


def test_an_int8_table_is_read_as_the_format_defines(int4: Path, tmp_path: Path) -> None:
    qweight = torch.randint(-127, 128, (257, 128), dtype=torch.int8)
    scales, columns = torch.rand(257, 1), torch.rand(128)

    def with_int8_table(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = {"qweight": qweight, "scales": scales, "column_scales": columns, "weight": torch.empty(0)}
        return {**tensors, **{f"embed_tokens.{part}": tensor for part, tensor in parts.items()}}

    checkpoint = copy_with(int4, tmp_path / "copy", with_int8_table)
    config = checkpoint.config
    config["quantization_config"] |= {"quant_method": "qembed_awq", "token_table": "int8"}
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    checkpoint = find(str(checkpoint.folder))
    tensors = dict(reference.weights(checkpoint))
    expected = qweight * (0.4 + 0.6 * (qweight / 127) ** 2) * scales * columns
    torch.testing.assert_close(tensors["embed_tokens.weight"], expected, rtol=1e-6, atol=0)
    assert set(tensors) == set(dict(reference.weights(find(str(int4)))))
    assert sources.weight_format(checkpoint) == "awq-int4, int8 token table"
    assert np.isfinite(reference.embed(reference.load(checkpoint), TEXTS)).all()


def test_an_int8_table_whose_parts_do_not_fit_is_named(int4: Path, tmp_path: Path) -> None:
    parts = {"qweight": torch.zeros(257, 128, dtype=torch.int8), "scales": torch.ones(256, 1), "column_scales": torch.ones(128)}
    checkpoint = copy_with(
        int4, tmp_path / "copy", lambda tensors: {**tensors, **{f"embed_tokens.{k}": v for k, v in parts.items()}}
    )
    checkpoint.config["quantization_config"] |= {"quant_method": "qembed_awq", "token_table": "int8"}
    with pytest.raises(BadInput, match=r"embed_tokens: qweight, scales and column_scales do not fit together"):
        reference.load(checkpoint)


def test_int4_is_close_to_the_original_but_not_equal(fp16: Path, int4: Path) -> None:
    original = reference.embed(reference.load(find(str(fp16))), TEXTS)
    rounded = reference.embed(reference.load(find(str(int4))), TEXTS)
    cosine = (original * rounded).sum(axis=1)
    assert cosine.min() > 0.7
    assert cosine.max() < 0.9999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sources_in_other_dtypes_are_read(fp16: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    copy = copy_with(fp16, tmp_path / "copy", lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    cosine = (reference.embed(reference.load(copy), TEXTS) * own_vectors(fp16, TEXTS)).sum(axis=1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_computation_is_in_the_requested_dtype(fp16: Path, dtype: str) -> None:
    loaded = reference.load(find(str(fp16)), dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    vectors = reference.embed(loaded, TEXTS)
    assert vectors.dtype == np.float32
    assert (vectors * own_vectors(fp16, TEXTS)).sum(axis=1).min() > 0.999


def test_a_causal_language_models_prefix_and_head_are_accepted(fp16: Path, tmp_path: Path) -> None:
    def prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        prefixed_tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return {**prefixed_tensors, "lm_head.weight": tensors["embed_tokens.weight"].clone()}

    vectors = reference.embed(reference.load(copy_with(fp16, tmp_path / "copy", prefixed)), TEXTS)
    assert np.abs(vectors - own_vectors(fp16, TEXTS)).max() < 2e-6


def test_a_missing_tensor_is_named(fp16: Path, tmp_path: Path) -> None:
    name = "layers.1.mlp.up_proj.weight"
    incomplete = copy_with(fp16, tmp_path / "copy", lambda tensors: {key: tensors[key] for key in tensors if key != name})
    with pytest.raises(BadInput, match=name.replace(".", r"\.")):
        reference.load(incomplete)


def test_a_tensor_of_another_shape_is_named(fp16: Path, tmp_path: Path) -> None:
    cut = copy_with(fp16, tmp_path / "copy", lambda tensors: {**tensors, "norm.weight": tensors["norm.weight"][:64].clone()})
    with pytest.raises(BadInput, match=r"do not fit config\.json.*norm\.weight"):
        reference.load(cut)


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_int4_parts_that_do_not_fit_are_named(int4: Path, tmp_path: Path, part: str) -> None:
    name = f"layers.0.mlp.down_proj.{part}"
    cut = copy_with(int4, tmp_path / "copy", lambda tensors: {**tensors, name: tensors[name][:1].clone()})
    with pytest.raises(BadInput, match=r"layers\.0\.mlp\.down_proj: .*do not fit together"):
        reference.load(cut)


def test_an_int4_part_that_is_missing_is_named(int4: Path, tmp_path: Path) -> None:
    name = "layers.0.mlp.down_proj.scales"
    incomplete = copy_with(int4, tmp_path / "copy", lambda tensors: {key: tensors[key] for key in tensors if key != name})
    with pytest.raises(BadInput, match=r"down_proj\.scales is missing"):
        reference.load(incomplete)


@pytest.mark.parametrize("model_type", ["no-such-model", None])
def test_an_unknown_architecture_is_one_line(fp16: Path, tmp_path: Path, model_type: Any) -> None:
    shutil.copytree(fp16, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(BadInput, match="model_type") as caught:
        reference.load(Checkpoint("copy", tmp_path / "copy"))
    assert "\n" not in str(caught.value)


KINDS = [("Transformer", ""), ("Pooling", "1_Pooling")]


def test_other_pooling_is_refused(fp16: Path, tmp_path: Path) -> None:
    shutil.copytree(fp16, tmp_path / "copy")
    (tmp_path / "copy" / "1_Pooling").mkdir()
    (tmp_path / "copy" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(BadInput, match=r"modules\.json is missing"):
        reference.load(Checkpoint("copy", tmp_path / "copy"))
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in KINDS]
    (tmp_path / "copy" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(BadInput, match="pooling mode 'max'"):
        reference.load(Checkpoint("copy", tmp_path / "copy"))


def test_a_text_beyond_the_context_is_refused(fp16: Path) -> None:
    loaded = reference.load(find(str(fp16)))
    assert reference.embed(loaded, ["x" * 95]).shape == (1, 128)
    with pytest.raises(BadInput, match="text 2 has 97 tokens; the model takes 96"):
        reference.embed(loaded, ["x", "x" * 96])


def test_an_unknown_dtype_is_refused(fp16: Path) -> None:
    with pytest.raises(ValueError, match="int8"):
        reference.load(find(str(fp16)), "int8")


def test_batches_hold_every_row_once_and_keep_the_budget() -> None:
    lengths = [int(length) for length in np.random.default_rng(1).integers(1, 300, 500)] + [900]
    groups = reference.batches(lengths, 800)
    assert sorted(row for group in groups for row in group) == list(range(501))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= 800
    assert [500] in groups
    assert len(groups) < 2 * sum(lengths) / 800
    assert reference.batches([], 800) == []
