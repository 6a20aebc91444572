"""A tiny random checkpoint in Qwen3-Embedding's layout, its plainly rounded AWQ INT4 copy, and a server made of them."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qembed.eval.embedding import SENTINEL
from tests.answering import Asked, answering

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
END = "<|endoftext|>"
OPENAI_FIELDS = ("model", "input", "encoding_format", "dimensions")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own cache is never touched, and no test finds what another computed."""
    monkeypatch.setenv("QEMBED_EVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the original: float16 tensors without a `model.` prefix, one token a byte."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3Model

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
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
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def int4(fp16: Path) -> Path:
    """The same, rounded to the nearest of 16 steps in groups of 128, with a note of where it came from."""
    import torch
    from safetensors.torch import load_file, save_file

    from qembed.checkpoint.awq_layout import pack

    folder = fp16.parent / "tiny-AWQ-INT4"
    shutil.copytree(fp16, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(fp16 / "model.safetensors").items():
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
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": quantization}))
    (folder / "qembed.json").write_text(json.dumps({"source": {"model": str(fp16)}}))
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


class FakeServer:
    """An OpenAI-compatible embedding server whose vectors depend on the text alone, and that keeps what it was asked."""

    def __init__(self) -> None:
        self.dimension = 64
        self.limit: int | None = None
        self.noise = 0.0
        self.fields: set[str] = set()  # of requests, beside OpenAI's
        self.inputs: list[str] = []  # less the sentence that `qembed eval` recognizes a server by
        self.dies_after: int | None = None
        self.changed: dict[str, list[float]] = {}
        self.refusal: int | None = None
        self.key: str | None = None
        self.about: dict[str, str] | None = None  # that a `qembed serve` tells in its /metrics
        self.url = ""

    def vector(self, text: str) -> list[float]:
        if text in self.changed:
            return self.changed[text]
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        vector = np.random.default_rng(digest).normal(size=self.dimension)
        vector += self.noise * np.random.default_rng(digest + 1).normal(size=self.dimension)
        return [float(value) for value in vector / np.linalg.norm(vector)]

    def reply(self, asked: Asked) -> tuple[int, object]:
        if not asked.body:
            if self.key is not None and asked.headers["Authorization"] != f"Bearer {self.key}":
                return 401, {}
            if self.about is not None and asked.path == "/metrics":
                labels = ",".join(f'{name}="{value}"' for name, value in self.about.items())
                return 200, f"qembed_serving{{{labels}}} 1.0\nqembed_memory_bytes 1.2345e+09\n".encode()
            if self.about is not None and asked.path == "/version":
                return 200, {"version": "9.9"}
        return self.answer(asked.path, asked.body)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models":
            limit = {} if self.limit is None else {"max_model_len": self.limit}
            return 200, {"object": "list", "data": [{"id": "fake", "object": "model", "created": 0, "owned_by": "x", **limit}]}
        if path != "/v1/embeddings":
            return 404, {"error": {"message": "no such path"}}
        if self.refusal is not None:
            return self.refusal, {"error": {"message": "the engine is dead", "type": "x", "code": self.refusal}}
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if self.dies_after is not None and len(self.inputs) >= self.dies_after:
            return 500, {"error": {"message": "the engine is dead", "type": "x", "code": 500}}
        self.fields |= {f"{name}={value}" for name, value in body.items() if name not in OPENAI_FIELDS}
        self.inputs += [text for text in texts if text != SENTINEL]
        data = []
        for index, text in enumerate(texts):
            vector: Any = self.vector(text)
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        return 200, {"object": "list", "model": "fake", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


@pytest.fixture
def start_server() -> Iterator[Callable[[], FakeServer]]:
    """Starts as many servers as a test asks for."""
    with ExitStack() as running:

        def start() -> FakeServer:
            fake = FakeServer()
            fake.url = running.enter_context(answering(fake.reply))
            return fake

        yield start
