"""Published embedders, by the settings of their folders on the hub with smaller sizes: what is read of each, or why it is not.

docs/models.md has the same table. `source` says where the settings are from; those of "the hub" without another source rest on
the model's page alone, and were not compared with its files.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput
from qembed.vllm.devices import Target
from qembed.vllm.kernels import Cpu
from qembed.vllm.settings import ServerSettings, resolve
from tests.checkpoints import END
from tests.embedders import write_embedder, write_voyage

CPU = Target("cpu", "CPU")
VLLM_MODELS = "docs.vllm.ai: supported models, embedding"
VLLM_TESTS = "vLLM's tests/models/language/pooling_mteb_test"


@dataclass(frozen=True)
class Published:
    """A model: arguments of `write_embedder`, more of tokenizer_config.json, and what is read of it, or why it is refused."""

    source: str
    folder: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    only_int4: bool = False
    tokenizer: dict[str, Any] = field(default_factory=dict)
    appends: bool = True


INSTRUCT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
PUBLISHED = {
    "Qwen/Qwen3-Embedding-0.6B": Published(
        "huggingface.co/Qwen/Qwen3-Embedding-0.6B",
        {
            "config": {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False, "sliding_window": None},
            "prompts": {"prompts": {"query": INSTRUCT, "document": ""}, "default_prompt_name": None},
        },
        {"attention": "causal", "pooling": "last", "normalized": True, "default_prompt": None},
    ),
    "Octen/Octen-Embedding-0.6B": Published(
        "the hub: a fine-tuned Qwen3-Embedding, last token, Normalize (that of the 4B and 8B with a config.json)",
        {"config": {"architectures": ["Qwen3ForCausalLM"]}, "normalize_config": {"normalize_embeddings": True}},
        {"attention": "causal", "pooling": "last", "normalized": True},
    ),
    "microsoft/harrier-oss-v1-0.6b": Published(
        "its files, as github.com/…/geopres-grid read them: Qwen3Model, no sentence_bert_config.json, Normalize, no Matryoshka",
        {"config": {"architectures": ["Qwen3Model"]}, "prompts": {"prompts": {"web_search_query": INSTRUCT}}},
        {"attention": "causal", "pooling": "last", "normalized": True, "is_matryoshka": False},
    ),
    "HIT-TMG/KaLM-embedding-multilingual-mini-instruct-v1": Published(
        "the hub: Qwen2, mean, 512 tokens",
        {
            "family": "qwen2",
            "pooling": "mean",
            "config": {"architectures": ["Qwen2Model"]},
            "transformer": {"max_seq_length": 64, "do_lower_case": False},
        },
        {"attention": "causal", "pooling": "mean", "context": 64, "family": "qwen2"},
    ),
    "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5": Published(
        "the hub: bidirectional Qwen2 in code of its own; nntrainer#3712 and mteb load it with that",
        {
            "family": "qwen2",
            "pooling": "mean",
            "config": {"architectures": ["Qwen2Model"], "auto_map": {"AutoModel": "modeling.Qwen2Model"}},
        },
        refused="auto_map",
    ),
    "the same, with is_causal false instead of auto_map": Published(
        "as the message for the model before says",
        {"family": "qwen2", "pooling": "mean", "config": {"architectures": ["Qwen2Model"], "is_causal": False}},
        {"attention": "bidirectional", "pooling": "mean", "architecture": "Qwen2Model"},
    ),
    "voyageai/voyage-4-nano": Published(
        f"its files of revision 67fabc9, and {VLLM_TESTS}/test_voyage.py: num_labels 2048, mean, 32,768 of 40,960 positions",
        {"voyage": True},
        {"attention": "bidirectional", "pooling": "mean", "width": 96, "architecture": "VoyageQwen3BidirectionalEmbedModel"},
    ),
    "jinaai/jina-embeddings-v5-text-small": Published(
        f"{VLLM_TESTS}/test_jina.py: JinaEmbeddingsV5Model; jina.ai/models: Qwen3 with four LoRA adapters",
        {"config": {"architectures": ["JinaEmbeddingsV5Model"]}},
        refused="JinaEmbeddingsV5Model",
    ),
    "jinaai/jina-embeddings-v5-text-small-retrieval": Published(
        "the hub: merged, Qwen3, last token, sizes 32 to 1024; recipes.vllm.ai: the simplest path for vLLM",
        {
            "config": {"architectures": ["Qwen3Model"]},
            "prompts": {"prompts": {"query": "Query: ", "document": "Document: "}},
        },
        {"attention": "causal", "pooling": "last"},
    ),
    "nvidia/llama-nemotron-embed-1b-v2": Published(
        f"{VLLM_TESTS}/test_nemotron.py: LlamaBidirectionalModel, mean; its code: model_type llama_bidirec, pooling avg",
        {
            "family": "llama",
            "pooling": "mean",
            "config": {
                "architectures": ["LlamaBidirectionalModel"],
                "auto_map": {"AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel"},
                "pooling": "avg",
            },
            "model_type": "llama_bidirec",
        },
        {"attention": "bidirectional", "pooling": "mean", "family": "llama"},
        only_int4=True,
    ),
    "intfloat/e5-mistral-7b-instruct": Published(
        "mteb#5237: tokenizer_config.json says add_eos_token, tokenizer.json adds <s> alone; last token, 4096 tokens",
        {
            "family": "mistral",
            "config": {"architectures": ["MistralModel"], "sliding_window": 64},
            "transformer": {"max_seq_length": 64, "do_lower_case": False},
            "prompts": {"prompts": {"web_search_query": INSTRUCT}},
        },
        refused="add_eos_token",
        tokenizer={"add_eos_token": True},
        appends=False,
    ),
    "the same with the end token in tokenizer.json": Published(
        "as the message for the model before says",
        {
            "family": "mistral",
            "config": {"architectures": ["MistralModel"], "sliding_window": 64},
            "transformer": {"max_seq_length": 64, "do_lower_case": False},
            "prompts": {"prompts": {"web_search_query": INSTRUCT}},
        },
        {"attention": "causal", "pooling": "last", "context": 64, "family": "mistral"},
        tokenizer={"add_eos_token": True},
    ),
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": Published(
        f"{VLLM_MODELS}: its tokenizer needs the model's code, to append a token",
        {
            "family": "qwen2",
            "config": {
                "architectures": ["Qwen2ForCausalLM"],
                "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"},
                "is_causal": False,
            },
        },
        refused="tokenizer_config.json: the tokenizer comes with code",
        tokenizer={"add_eos_token": True, "auto_map": {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", None]}},
        appends=False,
    ),
    "the same without auto_map": Published(
        "its tokenizer.json appends no token, tokenizer_config.json says add_eos_token",
        {"family": "qwen2", "config": {"architectures": ["Qwen2ForCausalLM"]}},
        refused="add_eos_token",
        tokenizer={"add_eos_token": True},
        appends=False,
    ),
}


def write(model: Published, folder: Path) -> Checkpoint:
    arguments = dict(model.folder)
    model_type = arguments.pop("model_type", None)
    if arguments.get("voyage"):
        return write_voyage(folder, folder.with_name("plain"))
    checkpoint = write_embedder(folder, **arguments)
    changes = {"config.json": {"model_type": model_type} if model_type else {}, "tokenizer_config.json": model.tokenizer}
    if not model.appends:
        changes["tokenizer.json"] = {"post_processor": None}
    for name, values in changes.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))
    return Checkpoint(checkpoint.name, folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_as_they_are_meant_or_refused(name: str, tmp_path: Path) -> None:
    model = PUBLISHED[name]
    checkpoint = write(model, tmp_path / "model")
    if model.refused is not None:
        with pytest.raises(BadInput, match=re.escape(model.refused)):
            _ = checkpoint.embedder
        return
    assert {fact: getattr(checkpoint.embedder, fact) for fact in model.facts} == model.facts
    assert checkpoint.appended_token == END
    if model.only_int4:
        with pytest.raises(BadInput, match="quantize the model"):
            resolve(ServerSettings(checkpoint), CPU, Cpu(), 1)
    else:
        resolve(ServerSettings(checkpoint), CPU, Cpu(), 1)


def test_docs_list_the_published_models() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert [name for name in PUBLISHED if "/" in name and name not in page] == []
