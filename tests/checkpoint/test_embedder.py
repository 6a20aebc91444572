"""The description of a checkpoint: what its folder says about vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.vllm.arguments import engine_arguments, rules
from qembed.vllm.devices import Target
from qembed.vllm.kernels import Cpu
from qembed.vllm.settings import Launch, ServerSettings, resolve
from tests.checkpoints import END, write_checkpoint
from tests.embedders import DENSE, PROMPTS, WIDE, write_embedder

CPU = Target("cpu", "CPU")


def launched(checkpoint: Checkpoint, **settings: Any) -> Launch:
    return resolve(ServerSettings(checkpoint, **settings), CPU, Cpu(), 1)


def overrides(launch: Launch) -> dict[str, Any]:
    words = engine_arguments(launch)
    values: dict[str, Any] = json.loads(words[words.index("--hf-overrides") + 1])
    return values


def test_a_model_that_lists_its_sizes_keeps_to_them(tmp_path: Path) -> None:
    checkpoint = write_embedder(tmp_path / "model", config={"matryoshka_dimensions": [64, 96]})
    sizes = [size for size in range(1, 200) if checkpoint.embedder.allows(size)]
    assert sizes == [64, 96, 128]
    launch = launched(checkpoint)
    assert [size for size in range(1, 200) if rules(launch, "", 0).allows(size)] == sizes
    assert overrides(launch)["matryoshka_dimensions"] == sizes
    assert checkpoint.embedder.cut_note is None


def test_other_models_give_any_size_from_32_with_a_note_if_they_were_not_trained_for_it(tmp_path: Path) -> None:
    checkpoint = write_embedder(tmp_path / "model", dense=[WIDE])
    assert [size for size in range(1, 200) if checkpoint.embedder.allows(size)] == list(range(32, 161))
    assert overrides(launched(checkpoint)) | {"max_position_embeddings": 128} == {
        "is_matryoshka": True,
        "matryoshka_dimensions": None,
        "max_position_embeddings": 128,
    }
    assert "trained to be cut" in str(checkpoint.embedder.cut_note)
    trained = write_embedder(tmp_path / "trained", config={"is_matryoshka": True})
    named = write_embedder(tmp_path / "Qwen3-Embedding-0.6B")
    assert trained.embedder.cut_note is named.embedder.cut_note is None


def test_the_context_is_the_smaller_of_length_and_positions(tmp_path: Path) -> None:
    for number, (length, context) in enumerate([(24, 24), (None, 128), (5000, 128)]):
        checkpoint = write_embedder(tmp_path / str(number), transformer={"max_seq_length": length})
        assert checkpoint.embedder.context == launched(checkpoint).max_model_len == context
    short = Checkpoint("short", tmp_path / "0")
    assert overrides(launched(short, max_model_len=100))["model_max_length"] == 100
    with pytest.raises(BadInput, match="128 positions"):
        launched(short, max_model_len=129)


def test_texts_that_a_later_token_changes_are_computed_in_one_step(tmp_path: Path) -> None:
    for number, (arguments, whole) in enumerate(
        [({}, False), ({"pooling": "mean"}, True), ({"config": {"is_causal": False}}, True)]
    ):
        checkpoint = write_embedder(tmp_path / str(number), **arguments)
        sizes = {"max_num_batched_tokens": 32, "max_num_seqs": 2}
        launch = launched(checkpoint, kv_cache=checkpoint.embedder.is_causal, **sizes)
        assert launch.keeps_cache is checkpoint.embedder.is_causal
        assert (launch.longest_step >= launch.max_model_len) is whole
        assert ("--no-enable-chunked-prefill" in engine_arguments(launch)) is whole


def test_a_bidirectional_model_is_named_as_vllm_computes_it(tmp_path: Path) -> None:
    for family, architecture in (("qwen3", "Qwen3Model"), ("qwen2", "Qwen2Model"), ("llama", "LlamaModel")):
        checkpoint = write_embedder(
            tmp_path / family, family=family, config={"is_causal": False, "architectures": [f"{architecture[:-5]}ForCausalLM"]}
        )
        values = overrides(launched(checkpoint))
        assert (values["architectures"], values["is_causal"]) == ([architecture], False)
        written = checkpoint.embedder.config(checkpoint.config)
        assert (written["architectures"], written["is_causal"], written["model_type"]) == ([architecture], False, family)
        with pytest.raises(BadInput, match="--kv-cache"):
            launched(checkpoint, kv_cache=True)


def test_without_modules_json_it_says_what_it_takes_for_the_vector(tmp_path: Path) -> None:
    causal = write_checkpoint(tmp_path / "causal", "qwen3", architectures=["Qwen3ForCausalLM"])
    assert (causal.embedder.pooling, causal.embedder.normalized) == ("last", True)
    assert any("no modules.json" in note and "last token" in note for note in causal.embedder.notes())
    bare = write_checkpoint(tmp_path / "bare", "qwen3", architectures=["Qwen3Model"])
    with pytest.raises(BadInput, match="1_Pooling"):
        _ = bare.embedder


def test_vectors_without_unit_length_and_a_default_prompt_are_noted(tmp_path: Path) -> None:
    checkpoint = write_embedder(tmp_path / "model", dense=[DENSE], normalize=False, prompts=PROMPTS)
    assert any("no unit length" in note for note in checkpoint.embedder.notes())
    assert not list(checkpoint.embedder.notes(normalized=True))
    assert (checkpoint.embedder.width, checkpoint.embedder.document_prompt) == (64, "Q: ")
    assert checkpoint.appended_token == END


OTHER = {"prompts": {"passage": "P: "}, "default_prompt_name": None}


@pytest.mark.parametrize(
    ("name", "stored", "query", "others"),
    [
        ("model", None, "", None),
        ("model", {"prompts": {"query": "Q: "}}, "Q: ", None),
        ("model", {"prompts": {"query": None}}, "", None),
        ("model", OTHER, "", "passage"),
        ("sampled", None, "", None),
        ("Qwen3-Embedding-4B-finetuned", None, "Instruct: ", None),
        ("qwen3-embedding", {"prompts": {"query": "Q: "}}, "Q: ", None),
    ],
)
def test_queries_take_the_prompt_of_the_folder_and_only_a_qwen3_embedding_has_one_without(
    name: str, stored: dict[str, Any] | None, query: str, others: str | None, tmp_path: Path
) -> None:
    checkpoint = write_embedder(tmp_path / name, prompts=stored)
    prompt = checkpoint.prompts["query"]
    assert prompt[: len(query)] == query
    assert bool(prompt) is bool(query)
    assert checkpoint.embedder.prompts == checkpoint.prompts == rules(launched(checkpoint), "", 0).prompts
    note = checkpoint.embedder.query_note
    assert (note is None) is (others is None)
    assert others is None or others in str(note)


def test_an_int4_checkpoint_has_the_prompts_of_its_source(tmp_path: Path) -> None:
    checkpoint = write_embedder(tmp_path / "renamed")
    (checkpoint.folder / "qembed.json").write_text(json.dumps({"source": {"model": "Qwen/Qwen3-Embedding-0.6B"}}))
    assert Checkpoint("renamed", checkpoint.folder).prompts["query"].startswith("Instruct: ")
