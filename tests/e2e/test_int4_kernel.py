"""The plugin's INT4 kernel in the real vLLM, on a CPU for which vLLM has none, against transformers in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import save_file

from qembed.checkpoint import awq_layout
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import find
from qembed.client import embeddings
from qembed.eval.texts import HELDOUT, read
from qembed.vectors import reference
from tests.e2e.launcher import Launched
from tests.e2e.test_serve import Vectors, cosines

pytestmark = pytest.mark.vllm

AVX2 = {"PYTHONPATH": str(Path(__file__).parent / "avx2")}
END = 13821
TOKENS = [*range(1000, 1110)]
LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 513, 2048)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WHOLE_ROW = -1


@pytest.fixture(scope="module")
def heldout() -> list[str]:
    return [item.text for item in read(HELDOUT).texts]


class Rounded:
    """A linear layer's weight rounded to 16 levels per group: values [N, K] 0…15, zero points and float16 scales [N, K/g]."""

    def __init__(self, weight: torch.Tensor, group: int, symmetric: bool) -> None:
        grouped = weight.float().unflatten(1, (-1, weight.shape[1] if group == WHOLE_ROW else group))
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        self.scales = ((high - low) / (14 if symmetric else 15)).half()
        steps = self.scales.float()
        self.zeros = torch.full_like(steps, 8) if symmetric else (-low / steps).round().clamp(0, 15)
        self.values = (grouped / steps[..., None] + self.zeros[..., None]).round().clamp(0, 15)
        self.weight = ((self.values - self.zeros[..., None]) * steps[..., None]).flatten(1)
        self.values = self.values.flatten(1)


def words(values: torch.Tensor) -> torch.Tensor:
    """Integers 0…15 [rows, 8n] as int32 [rows, n], the first in the lowest nibble."""
    nibbles = values.to(torch.int64).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return nibbles.sum(-1).to(torch.uint32).view(torch.int32).contiguous()


def as_awq(layer: Rounded) -> dict[str, torch.Tensor]:
    return {
        "qweight": awq_layout.pack(layer.values.T.to(torch.uint8)),
        "qzeros": awq_layout.pack(layer.zeros.T.to(torch.uint8)),
        "scales": layer.scales.T.contiguous(),
    }


def as_compressed_tensors(layer: Rounded) -> dict[str, torch.Tensor]:
    zeros = {} if bool((layer.zeros == 8).all()) else {"weight_zero_point": words(layer.zeros.T).T.contiguous()}
    return {
        "weight_packed": words(layer.values),
        "weight_scale": layer.scales,
        "weight_shape": torch.tensor(layer.values.shape),
        **zeros,
    }


def awq_config(group: int, symmetric: bool) -> dict[str, object]:
    assert not symmetric
    return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}


def compressed_tensors_config(group: int, symmetric: bool) -> dict[str, object]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == WHOLE_ROW else "group",
        "group_size": None if group == WHOLE_ROW else group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


Pack = Callable[[Rounded], dict[str, torch.Tensor]]
Configure = Callable[[int, bool], dict[str, object]]


def write(folder: Path, group: int, symmetric: bool, pack: Pack, configure: Configure) -> Path:
    """Write the sample with weights rounded to the nearest level into `folder`/packed, and dequantized into `folder`/float."""
    sample = find("sample")
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name in sample.shapes():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and stem.rpartition(".")[2] in LINEAR:
            layer = Rounded(sample.tensor(name), group, symmetric)
            packed |= {f"{stem}.{part}": tensor for part, tensor in pack(layer).items()}
            plain[name] = layer.weight
        else:
            packed[name] = plain[name] = sample.tensor(name)
    for kind, tensors in (("packed", packed), ("float", plain)):
        target = folder / kind
        shutil.copytree(sample.folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        quantization = {"quantization_config": configure(group, symmetric)} if kind == "packed" else {}
        (target / "config.json").write_text(json.dumps({**sample.config, **quantization}))
    return folder


@dataclass(frozen=True)
class Format:
    name: str
    group: int
    symmetric: bool
    pack: Pack
    configure: Configure


FORMATS = [
    Format("awq-32", 32, False, as_awq, awq_config),
    Format("awq-64", 64, False, as_awq, awq_config),
    Format("awq-128", 128, False, as_awq, awq_config),
    Format("compressed-tensors-asymmetric", 128, False, as_compressed_tensors, compressed_tensors_config),
    Format("compressed-tensors-symmetric-whole-row", WHOLE_ROW, True, as_compressed_tensors, compressed_tensors_config),
]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Format], tuple[Path, Launched]]]:
    """A function that starts the server of a format, and the next format's too, because most of a start uses one core.

    It returns the folder of the format's checkpoints and the server.
    """
    limits = ("--dtype", "float32", "--max-model-len", 4096, "--max-num-batched-tokens", 4096, "--allow-token-ids")
    servers: dict[str, tuple[Path, Launched]] = {}
    with ExitStack() as running:

        def start(format_: Format) -> tuple[Path, Launched]:
            folder = write(tmp_path_factory.mktemp("int4"), format_.group, format_.symmetric, format_.pack, format_.configure)
            kind = "--int4" if format_.pack is as_awq else "--fp16"
            server = Launched(kind, "--model", folder / "packed", "--port", 0, "--json", "--verbose", *limits, env=AVX2)
            return folder, running.enter_context(server)

        def start_with_next(format_: Format) -> tuple[Path, Launched]:
            place = FORMATS.index(format_)
            for started in FORMATS[place : place + 2]:
                if started.name not in servers:
                    servers[started.name] = start(started)
            return servers[format_.name]

        yield start_with_next


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_vectors_are_those_of_the_dequantized_weights(
    format_: Format, serve: Callable[[Format], tuple[Path, Launched]], heldout: list[str]
) -> None:
    """For each third held-out text; and for texts of LENGTHS tokens (the kernel's rows), one by one and all in one batch.

    The three formats of AWQ have all held-out texts together.
    """
    texts = heldout[FORMATS.index(format_) % 3 :: 3]
    folder, server = serve(format_)
    with server:
        loaded = reference.load(Checkpoint("float", folder / "float"))
        expected = reference.embed(loaded, texts)
        rows = [[*(TOKENS * 20)[: length - 1], END] for length in LENGTHS]
        exact = np.stack([unit_vector(loaded, ids) for ids in rows])
        server.wait_ready()
        assert "Using Int4LinearKernel" in server.err
        assert "compiled INT4 kernel is missing" not in server.err
        served = embeddings.embed(texts, url=server.url, batch_size=64)
        assert cosines(served, expected).min() > 0.9999
        batched, alone = ask(server, rows), np.concatenate([ask(server, [ids]) for ids in rows])
        assert cosines(batched, exact).min() > 0.9999
        assert cosines(alone, exact).min() > 0.9999
        texts_alone = embeddings.embed(texts[::-12], url=server.url, batch_size=1)
        assert cosines(np.concatenate((alone, texts_alone)), np.concatenate((batched, served[::-12]))).min() > 0.99999


def ask(server: Launched, rows: list[list[int]]) -> Vectors:
    with openai.OpenAI(base_url=server.url, api_key="none", timeout=300) as api:
        answer = api.embeddings.create(model=server.model, input=rows)
    return np.asarray([item.embedding for item in answer.data], np.float32)


def unit_vector(loaded: reference.Reference, ids: list[int]) -> Vectors:
    """The unit vector of token ids, through transformers."""
    with torch.inference_mode():
        last = loaded.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return (last / last.norm()).numpy()
