"""Splitting an engine step of several texts into pieces."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qembed.serve.vllm_plugin.pieces import compute_in_pieces, pieces


def test_a_step_that_fits_is_one_piece() -> None:
    (piece,) = pieces(torch.tensor([0, 3, 5]), torch.tensor([3, 2]), 8)
    assert (piece.begin, piece.end, piece.requests) == (0, 5, (0, 2))
    assert piece.query_start_loc.tolist() == [0, 3, 5]
    assert piece.seq_lens.tolist() == [3, 2]


def test_a_text_continues_in_the_next_piece_with_its_earlier_tokens_as_context() -> None:
    """Texts of 2, 7 and 3 tokens in pieces of 4: ab|cdef ghi|jkl → ab cd · efgh · i jkl."""
    first, second, third = pieces(torch.tensor([0, 2, 9, 12]), torch.tensor([2, 7, 3]), 4)
    assert [(piece.begin, piece.end, piece.requests) for piece in (first, second, third)] == [
        (0, 4, (0, 2)),
        (4, 8, (1, 2)),
        (8, 12, (1, 3)),
    ]
    assert [piece.query_start_loc.tolist() for piece in (first, second, third)] == [[0, 2, 4], [0, 4], [0, 1, 4]]
    assert [piece.seq_lens.tolist() for piece in (first, second, third)] == [[2, 2], [6], [7, 3]]


def test_tokens_of_earlier_steps_count_as_context() -> None:
    first, second = pieces(torch.tensor([0, 6]), torch.tensor([16]), 4)
    assert (first.seq_lens.tolist(), second.seq_lens.tolist()) == ([14], [16])


class Builder:
    """Builds attention metadata as FlashAttention 3 does: a full build plans into a buffer that later builds overwrite."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(1, dtype=torch.int32)

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        assert common_prefix_len == 0
        if not fast_build:
            self.buffer[0] = common.max_seq_len
        plan = torch.tensor([common.max_seq_len]) if fast_build else self.buffer
        return SimpleNamespace(plan=plan, common=common)


class Layer:
    """A decoder layer of two numbers a token: adds one to its input, and notes what it attends to."""

    self_attn = None

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        import vllm.forward_context

        metadata = vllm.forward_context.get_forward_context().attn_metadata["layer"]
        self.calls.append((len(positions), int(metadata.plan[0])))
        return hidden + 1, hidden if residual is None else residual + hidden


class Model:
    """Two layers, called as vLLM's model runner on a GPU calls its model: by keywords."""

    def __init__(self) -> None:
        self.layers = [Layer(), Layer()]
        self.model = SimpleNamespace(layers=self.layers)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden, residual = input_ids[:, None].float().repeat(1, 2), None
        for layer in self.layers:
            hidden, residual = layer.forward(positions, hidden, residual)
        assert residual is not None
        return hidden + residual


@pytest.mark.vllm
def test_a_long_step_gives_what_a_whole_one_does_and_no_piece_changes_the_plan_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm.forward_context

    metadata = SimpleNamespace(
        query_start_loc=torch.tensor([0, 3, 10]),
        seq_lens=torch.tensor([3, 7]),
        block_table=torch.zeros(2, 1, dtype=torch.int32),
    )
    current = [
        SimpleNamespace(attn_metadata={"layer": metadata}, slot_mapping={"layer": torch.arange(10)}, skip_compiled=False)
    ]

    @contextmanager
    def override(context: Any) -> Iterator[None]:
        current.append(context)
        yield
        current.pop()

    monkeypatch.setattr(vllm.forward_context, "get_forward_context", lambda: current[-1])
    monkeypatch.setattr(vllm.forward_context, "override_forward_context", override)
    monkeypatch.setattr(
        "qembed.serve.vllm_plugin.pieces.replace", lambda context, **fields: SimpleNamespace(**{**vars(context), **fields})
    )
    model = Model()
    ids, positions = torch.arange(10), torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 6])
    metadata.plan = torch.tensor([7])
    whole = model.forward(ids, positions)
    for layer in model.layers:
        layer.calls.clear()
    builder = Builder()
    group = SimpleNamespace(get_metadata_builder=lambda: builder)
    compute_in_pieces(SimpleNamespace(get_model=lambda: model, attn_groups=[[group]]), 4)
    assert torch.equal(model.forward(input_ids=ids, positions=positions), whole)
    assert current[0].skip_compiled
    # Pieces of 4, 4 and 2 tokens: the first text whole and one token of the second, then five and seven tokens of the second.
    assert [layer.calls for layer in model.layers] == [[(4, 3), (4, 5), (2, 7)]] * 2


def attend_in_pieces(device: str, dtype: str) -> dict[str, float]:
    """The output of attend_in_pieces.py."""
    command = [sys.executable, "-m", "tests.serve.vllm_plugin.attend_in_pieces", device, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    differences: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return differences


@pytest.mark.vllm
def test_the_triton_kernel_that_a_t4_gets_attends_in_pieces_as_in_a_whole() -> None:
    """In Triton's interpreter, which computes what the kernel would compute on a GPU."""
    result = attend_in_pieces("cpu", "float32")
    assert result["pieces"] == 3
    assert result["between"] < 1e-5
    assert result["from_torch"] < 1e-5
