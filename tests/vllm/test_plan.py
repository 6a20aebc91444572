"""The memory plan, with arithmetic that a reader can check by hand."""

from __future__ import annotations

from typing import Any

import pytest

from qembed.checkpoint import matryoshka
from qembed.checkpoint.embedder import Embedder
from qembed.errors import BadInput
from qembed.vllm import plan

SMALL = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
CONFIG = {**SMALL, "max_position_embeddings": 32768}


def embedder(context: int) -> Embedder:
    """That of a model with 32,768 positions, which cuts texts to `context` tokens."""
    return Embedder("qwen3", "causal", "last", (), True, 1024, (), True, context, 32768)


def test_the_cache_of_the_0_6b_is_112_kib_per_token_in_16_bit() -> None:
    assert plan.kv_bytes_per_token(CONFIG, "float16") == 112 * 1024
    assert plan.kv_bytes_per_token(CONFIG, "float32") == 224 * 1024


def test_head_dim_and_kv_heads_default_to_hidden_size_over_heads() -> None:
    config = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    assert plan.kv_bytes_per_token(config, "float16") == 2 * 2 * 3 * 32 * 2


def test_the_cache_holds_a_long_text_a_step_and_a_partial_block_per_sequence() -> None:
    assert plan.kv_tokens(max_model_len=8192, max_num_seqs=32, max_num_batched_tokens=2048, block_size=32) == (
        8192 + 2048 + 31 * 32 + 32
    )
    assert plan.kv_tokens(max_model_len=33, max_num_seqs=1, max_num_batched_tokens=1, block_size=32) == (2 + 1 + 1) * 32


def test_texts_that_fit_into_a_step_need_no_cache_beyond_it() -> None:
    assert plan.reads_whole(2048, 2048)
    assert not plan.reads_whole(2049, 2048)
    assert (
        plan.kv_tokens(max_model_len=2048, max_num_seqs=32, max_num_batched_tokens=2048, block_size=16) == 2048 + 30 * 16 + 16
    )


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        ({}, True),
        ({"rope_scaling": None, "rope_theta": 1e6}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, True),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, False),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, False),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, False),
    ],
)
def test_positions_are_plain_unless_rope_is_scaled(config: dict[str, object], plain: bool) -> None:
    assert plan.has_plain_positions(config) is plain


def test_floats_are_counted_in_the_served_dtype_and_integers_as_stored() -> None:
    shapes = {
        "embed_tokens.weight": ([100, 64], "F16"),
        "layers.0.mlp.up_proj.qweight": ([64, 16], "I32"),
        "layers.0.mlp.up_proj.qzeros": ([1, 16], "I32"),
        "layers.0.mlp.up_proj.scales": ([1, 128], "F16"),
        "norm.weight": ([64], "F16"),
    }
    assert plan.weight_bytes(shapes, "float16") == (12800, 64 * 16 * 4 + 16 * 4 + 128 * 2, 128)
    assert plan.weight_bytes(shapes, "float32") == (25600, 64 * 16 * 4 + 16 * 4 + 128 * 4, 256)


def test_an_int8_table_is_counted_as_stored_with_its_scales() -> None:
    stored = {
        "model.embed_tokens.qweight": ([100, 64], "I8"),
        "model.embed_tokens.scales": ([100, 1], "F32"),
        "model.embed_tokens.column_scales": ([64], "F32"),
        "model.embed_tokens.weight": ([0], "F16"),
        "lm_head.weight": ([100, 64], "F16"),
    }
    for dtype, size in (("float16", 2), ("float32", 4)):
        assert plan.weight_bytes(stored, dtype) == (100 * 64 + 100 * 4 + 64 * 4, 100 * 64 * size, 0)
    converted = plan.with_int8_table({"model.embed_tokens.weight": ([100, 64], "BF16"), "lm_head.weight": ([100, 64], "F16")})
    assert plan.weight_bytes(converted, "float16") == plan.weight_bytes(stored, "float16")


def test_the_total_is_the_sum_of_the_lines() -> None:
    shapes = {"embed_tokens.weight": ([10, 1024], "F16"), "norm.weight": ([1024], "F16")}
    memory = plan.make(
        shapes, CONFIG, dtype="float16", max_model_len=64, max_num_seqs=1, max_num_batched_tokens=64, block_size=16
    )  # fmt: skip
    assert memory.weights == 11 * 1024 * 2
    assert memory.kv_tokens == 64 + 16
    assert memory.kv_cache == 80 * 4 * 1024
    assert memory.total == memory.weights + memory.kv_cache + memory.activations + memory.graphs + memory.runtime


def test_without_a_cache_one_layer_has_keys_and_values_and_a_longer_text_adds_its_residual_stream() -> None:
    sizes: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 2048, "block_size": 32, "dtype": "float16"}
    shapes = {"embed_tokens.weight": ([10, 1024], "F16")}
    short, long = (plan.make(shapes, CONFIG, max_model_len=length, **sizes) for length in (2048, 32768))
    assert (short.kv_tokens, long.kv_tokens) == (2048 + 32, 32768 + 32)
    assert long.kv_cache == (32768 + 32) * 4 * 1024
    assert long.activations - short.activations == (32768 - 2048) * 3 * 1024 * 2
    with_cache = plan.make(shapes, CONFIG, max_model_len=32768, keeps_cache=True, **sizes)
    assert with_cache.kv_cache == (32768 + 2048 + 32) * 112 * 1024
    assert with_cache.activations == short.activations


@pytest.mark.parametrize(
    ("config", "alike"),
    [
        ({}, True),
        ({"layer_types": ["full_attention"] * 2}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"use_sliding_window": True}, False),
    ],
)
def test_layers_that_attend_differently_do_not_share(config: dict[str, object], alike: bool) -> None:
    assert plan.layers_are_alike(config) is alike


def test_processes_that_share_the_libraries_take_less() -> None:
    sizes: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 64, "block_size": 16}
    shapes = {"embed_tokens.weight": ([10, 1024], "F16")}
    kinds: tuple[plan.Processes, ...] = ("separate", "caller", "forked")
    separate, caller, forked = (plan.make(shapes, CONFIG, dtype="float32", processes=kind, **sizes).total for kind in kinds)
    assert separate - caller == 600 * 2**20
    assert forked < caller
    on_gpu = {plan.make(shapes, CONFIG, dtype="float16", device="cuda", processes=kind, **sizes).total for kind in kinds}
    assert len(on_gpu) == 1


def test_a_hopper_card_takes_as_much_before_the_model_as_was_measured_on_one() -> None:
    def runtime(capability: float | None) -> int:
        return int4_of_the_0_6b(max_model_len=2048, device="cuda", capability=capability).runtime

    assert runtime(9.0) == 780 * 2**20
    assert {runtime(capability) for capability in (None, 7.5, 8.6, 8.9)} == {500 * 2**20}


def test_activations_of_the_0_6b_are_24_kib_per_token_in_16_bit() -> None:
    config = {**CONFIG, "intermediate_size": 3072}
    assert plan.activation_bytes(config, "float16") == (2 * 1024 + 3 * 2048 + 4 * 1024) * 2 == 24 * 1024
    assert plan.activation_bytes(config, "float32") == 2 * plan.activation_bytes(config, "float16")
    wide = {**config, "intermediate_size": 4096}
    assert plan.activation_bytes(wide, "float16") == (2 * 1024 + 3 * 4096) * 2


def int4_of_the_0_6b(**sizes: Any) -> plan.Plan:
    config = {**CONFIG, "intermediate_size": 3072, "vocab_size": 151_669}
    shapes: dict[str, tuple[list[int], str]] = {"embed_tokens.weight": ([151_669, 1024], "F16")}
    for name, rows, columns in (("q", 1024, 2048), ("kv", 1024, 2048), ("o", 2048, 1024), ("mlp", 1024, 9216)):
        for layer in range(28):
            shapes[f"layers.{layer}.{name}.qweight"] = ([rows, columns // 8], "I32")
            shapes[f"layers.{layer}.{name}.qzeros"] = ([rows // 128, columns // 8], "I32")
            shapes[f"layers.{layer}.{name}.scales"] = ([rows // 128, columns], "F16")
    return plan.make(shapes, config, dtype="float16", max_num_seqs=32, max_num_batched_tokens=2048, block_size=16, **sizes)


def test_int4_of_the_0_6b_with_all_32768_positions_is_planned_below_1_6_gib() -> None:
    """The target of `make bench-gpu`; CUDA context and graphs are estimates."""
    memory = int4_of_the_0_6b(max_model_len=32768, device="cuda")
    assert memory.weights == pytest.approx(540e6, rel=0.01)
    assert memory.total <= 1.6 * 2**30
    assert int4_of_the_0_6b(max_model_len=32768, device="cuda", keeps_cache=True).total > 4.5 * 2**30


def test_the_longest_text_defaults_to_the_models_limit_and_with_a_cache_to_8192_tokens() -> None:
    whole, short = embedder(32768), embedder(512)
    assert plan.max_length(whole, None) == 32768
    assert plan.max_length(whole, None, keeps_cache=True) == 8192
    assert plan.max_length(short, None) == plan.max_length(short, None, keeps_cache=True) == 512
    for model in (whole, short):
        assert plan.max_length(model, 32768) == 32768
        with pytest.raises(BadInput, match="32768 positions"):
            plan.max_length(model, 32769)


@pytest.mark.parametrize("value", [None, 0, -1, "many", 1.5, True])
def test_an_invalid_size_in_config_json_is_named(value: object) -> None:
    with pytest.raises(BadInput, match="hidden_size"):
        plan.size_of({"hidden_size": value}, "hidden_size")


def test_dimensions_end_with_the_full_length() -> None:
    assert matryoshka.sizes(1024) == [32, 64, 128, 256, 512, 768, 1024]
    assert matryoshka.sizes(384) == [32, 64, 128, 256, 384]
    assert matryoshka.sizes(16) == [16]
