"""Reference vectors through transformers, from an FP16 checkpoint or from dequantized INT4 weights.

Both kinds of checkpoint become the same module tree, built from config.json and filled tensor by tensor, so that a difference
between two results is a difference between the weights. What becomes of the tokens' states is `checkpoint.embedder`;
of a reranker only the states are of use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed.checkpoint import awq_layout, int8_table
from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.embedder import HEAD
from qembed.checkpoint.head import Head, is_token
from qembed.checkpoint.reranker import LABEL_HEAD
from qembed.checkpoint.transformers_config import transformers_config
from qembed.errors import BadInput
from qembed.vllm import machine

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

DTYPES = ("float16", "bfloat16", "float32")
TOKEN_BUDGET = 8192


@dataclass(frozen=True)
class Reference:
    """A loaded model that turns texts into vectors.

    `head` makes vectors of the states of `model`. `dtype` is what it computes in, `limit` the longest text in tokens, including
    the appended last token, `rows` the rows of its token table.
    """

    model: Any
    head: Head
    is_causal: bool
    tokenizer: Tokenizer
    device: str
    dtype: str
    limit: int
    dimension: int
    rows: int


def load(checkpoint: Checkpoint, dtype: str = "float32", device: str = "cpu") -> Reference:
    """Load `checkpoint`, FP16 or AWQ INT4, in `dtype` (one of DTYPES) on `device` ("cpu", "cuda", …).

    INT4 weights are dequantized in float32 and then rounded to `dtype`; in float32 they are exact. No code from the checkpoint
    is executed.

    Raises:
        BadInput: transformers does not support the architecture, tensors are missing or of the wrong shape, or the checkpoint
            cannot be described (`checkpoint.trunk`).
        ValueError: `dtype` is not one of DTYPES.
    """
    import torch
    from transformers import AutoModel

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: not one of {', '.join(DTYPES)}")
    trunk = checkpoint.trunk
    torch.set_num_threads(min(torch.get_num_threads(), len(machine.cores())))
    build: Any = AutoModel.from_config
    try:
        config = transformers_config(checkpoint)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            model = build(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise BadInput(f"{checkpoint.folder}: transformers cannot build this model: {_first_line(error)}") from error
    state = {name: tensor.to(device, getattr(torch, dtype)) for name, tensor in weights(checkpoint)}
    try:
        # `assign` takes the tensors themselves: no second copy of the model in memory.
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise BadInput(f"{checkpoint.folder}: tensors do not fit config.json: {_first_line(error)}") from error
    _fill_buffers(model, config, device)
    model.eval()
    return Reference(
        model=model,
        head=Head.of(trunk, device),
        is_causal=trunk.is_causal,
        tokenizer=checkpoint.tokenizer(),
        device=device,
        dtype=dtype,
        limit=trunk.context,
        dimension=trunk.width,
        rows=int(config.vocab_size),
    )


def weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Names (without `model.` prefix) and tensors, less the heads of language models and classifiers; INT4 and INT8 to float32.

    Raises:
        BadInput: a tensor is missing, or the parts of an INT4 weight or of an INT8 token table do not fit together.
    """
    table = f"{checkpoint.prefix}embed_tokens."
    if checkpoint.has_int8_table:
        yield "embed_tokens.weight", _int8_table(checkpoint, table)
    for name in checkpoint.files:
        if name.startswith("lm_head.") or name in (HEAD, LABEL_HEAD) or name.endswith((".qzeros", ".scales")):
            continue
        if checkpoint.has_int8_table and name.startswith(table):
            continue
        short = name.removeprefix(checkpoint.prefix)
        if not name.endswith(".qweight"):
            yield short, checkpoint.tensor(name)
            continue
        stem = name.removesuffix(".qweight")
        parts = [checkpoint.tensor(f"{stem}.{part}") for part in ("qweight", "qzeros", "scales")]
        shapes = [tuple(part.shape) for part in parts]
        (inputs, words), (groups, zero_words), (scale_groups, outputs) = shapes
        if zero_words != words or scale_groups != groups or outputs != words * awq_layout.PACK or inputs % groups:
            raise BadInput(f"{checkpoint.folder}: {stem}: qweight, qzeros and scales do not fit together: {shapes}")
        yield short.removesuffix("qweight") + "weight", awq_layout.dequantize(*parts)


def embed(
    reference: Reference,
    texts: Sequence[str],
    *,
    token_budget: int = TOKEN_BUDGET,
    on_done: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """The vectors [texts, dimension] float32 of `texts`, in their order.

    Texts of similar length are batched, padded on the right: with causal attention padding changes nothing, otherwise it is
    masked. A batch holds at most `token_budget` tokens including padding (a longer text gets its own), which bounds memory.
    `on_done` is called with the number of texts after each batch. Vectors that are not finite are returned as they are.

    Raises:
        BadInput: a text has no tokens, more than the model's context, or one without a row in the token table.
    """
    import torch

    encodings = reference.tokenizer.encode_batch(list(texts))
    ids = [encoding.ids for encoding in encodings]
    for index, tokens in enumerate(ids):
        if not tokens:
            raise BadInput(f"text {index + 1} has no tokens")
        if len(tokens) > reference.limit:
            raise BadInput(f"text {index + 1} has {len(tokens)} tokens; the model takes {reference.limit}")
        if max(tokens) >= reference.rows:
            token = next(token for token, id_ in zip(encodings[index].tokens, tokens, strict=True) if id_ >= reference.rows)
            raise BadInput(f"text {index + 1} holds the token {token!r}, which the tokenizer has and the model has not")
    vectors = np.empty((len(texts), reference.dimension), np.float32)
    for rows in batches([len(tokens) for tokens in ids], token_budget):
        longest = max(len(ids[row]) for row in rows)
        padded = torch.zeros((len(rows), longest), dtype=torch.long)
        for place, row in enumerate(rows):
            padded[place, : len(ids[row])] = torch.tensor(ids[row])
        lengths = torch.tensor([len(ids[row]) for row in rows], device=reference.device)
        mask = None if reference.is_causal else is_token(lengths, longest).long()
        with torch.inference_mode():
            hidden = reference.model(
                input_ids=padded.to(reference.device), attention_mask=mask, use_cache=False
            ).last_hidden_state
            vectors[rows] = reference.head.vectors(hidden, lengths).cpu().numpy()
        if on_done is not None:
            on_done(len(rows))
    return vectors


def batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Row numbers in groups, longest texts first, with rows × longest length of each group within `token_budget`."""
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and (len(groups[-1]) + 1) * longest <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = lengths[row]
    return groups


def _int8_table(checkpoint: Checkpoint, prefix: str) -> torch.Tensor:
    parts = [checkpoint.tensor(prefix + part) for part in int8_table.TENSORS]
    shapes = [tuple(part.shape) for part in parts]
    rows, width = shapes[0]
    if shapes[1:] != [(rows, 1), (width,)]:
        names = "{}, {} and {}".format(*int8_table.TENSORS)
        raise BadInput(f"{checkpoint.folder}: {prefix.rstrip('.')}: {names} do not fit together: {shapes}")
    return int8_table.dequantize(*parts)


def _fill_buffers(model: torch.nn.Module, config: Any, device: str) -> None:
    """Recreate modules with buffers that no checkpoint holds (rotary tables), off the meta device."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, type(module)(config).to(device))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]
