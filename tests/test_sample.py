"""The bundled sample: a small trained model in the layout of Qwen/Qwen3-Embedding-0.6B."""

from __future__ import annotations

import json
from typing import Any

from qembed.checkpoint.find import find
from qembed.quantize.blocks import LINEARS
from qembed.quantize.checks import shape_of
from qembed.sample.training.pairs import ordered

SAMPLE = find("sample")


def stored(name: str) -> Any:
    return json.loads((SAMPLE.folder / name).read_text())


def test_config_is_that_of_a_qwen3_embedding_model() -> None:
    config = SAMPLE.config
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000
    assert config["num_hidden_layers"] >= 4
    assert config["hidden_size"] >= 256
    assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]


def test_tensors_are_float16_without_prefix_and_take_groups_of_128() -> None:
    shape = shape_of(SAMPLE, 128)
    assert all(shape.linear(name)[1] % 128 == 0 for name in LINEARS)
    assert "embed_tokens.weight" in SAMPLE.files
    assert not any(name.startswith(("model.", "lm_head")) for name in SAMPLE.files)
    assert {dtype for _, dtype in SAMPLE.shapes().values()} == {"F16"}
    assert (SAMPLE.folder / "model.safetensors").stat().st_size <= 20_000_000


def test_tokenizer_appends_the_last_token_and_is_lossless() -> None:
    tokenizer = SAMPLE.tokenizer()
    assert tokenizer.get_vocab_size() == SAMPLE.config["vocab_size"]
    end = tokenizer.token_to_id("<|endoftext|>")
    assert SAMPLE.config["eos_token_id"] == end
    for text in ("", "a", "Ünïcödé, 漢字 и emoji 🦀", "def f(x):\n\treturn x ** 2\n"):
        ids = tokenizer.encode(text).ids
        assert ids[-1] == end
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_transformers_reads_the_same_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SAMPLE.folder)
    text = "Instruct: Find code\nQuery:sort 12345 numbers"
    assert tokenizer(text)["input_ids"] == SAMPLE.tokenizer().encode(text).ids


def test_it_has_the_files_of_sentence_transformers() -> None:
    assert [module["type"].split(".")[-1] for module in json.loads((SAMPLE.folder / "modules.json").read_text())] == [
        "Transformer", "Pooling", "Normalize",
    ]  # fmt: skip
    pooling = stored("1_Pooling/config.json")
    assert pooling["pooling_mode_lasttoken"] is True
    assert pooling["word_embedding_dimension"] == SAMPLE.config["hidden_size"]
    assert sum(value is True for name, value in pooling.items() if name.startswith("pooling_mode")) == 1
    assert stored("config_sentence_transformers.json")["prompts"]["query"].startswith("Instruct: ")
    assert SAMPLE.prompts["query"].endswith("\nQuery:")


def test_similar_texts_are_nearer_than_dissimilar_ones() -> None:
    cosines = ordered(SAMPLE.folder)
    assert len(cosines) >= 20
    assert sum(similar > dissimilar for similar, dissimilar in cosines) >= 0.9 * len(cosines)
