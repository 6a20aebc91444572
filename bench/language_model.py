"""What INT4 costs a language model: last-token vectors under two prompts, and next-token predictions.

A language model that was never trained to embed still does under a prompt that asks for one word (PromptEOL, Jiang et al. 2023,
https://arxiv.org/abs/2307.16645). Its vectors share a large common direction, which hides errors: cosines are of the vectors
less the originals' mean.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.description import Checkpoint
from qembed.quantize import products
from qembed.vectors import reference

if TYPE_CHECKING:
    import torch

PROMPTS = {"bare": "{}", "PromptEOL": 'This sentence: "{}" means in one word:"'}
MAX_TOKENS = 384
"""Where a text is cut, prompt included."""
NEIGHBOURS = 10
ROWS, ROW_TOKENS = 12, 512
"""Number and length of the rows, cut from the joined texts, whose predictions are compared."""


def measure(source: Path, int4: Path, texts: Path) -> dict[str, Any]:
    """How far `int4` is from `source` on the lines of `texts`.

    Returns:
        For each prompt `centred`, the mean of 1 − centred cosine, and `kept`, the share of the 10 nearest neighbours that stay;
        `kl`, the mean KL divergence of the next token's distribution; `nll`, by how much its negative log-likelihood grows.
    """
    import torch

    vectors, logits, ids = outputs(source, texts)
    quantized, quantized_logits, _ = outputs(int4, texts)
    result: dict[str, Any] = {"texts": len(next(iter(vectors.values())))}
    for name, original in vectors.items():
        middle = original.mean(0)
        a, b = (torch.nn.functional.normalize(side - middle, dim=-1) for side in (original, quantized[name]))
        result[name] = {"centred": 1 - float((a * b).sum(-1).mean()), "kept": shared_neighbours(a, b)}
    pairs = [(a.float(), b.float()) for a, b in zip(logits, quantized_logits, strict=True)]
    result["kl"] = float(torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in pairs]).mean())
    losses = [
        torch.stack([-row[:-1].float().gather(1, tokens[1:, None]).mean() for row, tokens in zip(rows, ids, strict=True)])
        for rows in (logits, quantized_logits)
    ]
    result["nll"] = float((losses[1] - losses[0]).mean())
    return result


def shared_neighbours(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of each row's NEIGHBOURS nearest among `a` [n, d] that are its nearest among `b` too."""
    import torch

    nearest = [(side @ side.T - 9 * torch.eye(len(side))).topk(NEIGHBOURS).indices for side in (a, b)]
    return float(torch.stack([torch.isin(x, y).float().mean() for x, y in zip(*nearest, strict=True)]).mean())


@functools.lru_cache(maxsize=2)
def outputs(folder: Path, file: Path) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Last tokens' hidden states [texts, hidden] by prompt, log-probabilities of rows [tokens, vocabulary], and their ids."""
    import torch

    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    loaded = reference.load(Checkpoint(folder.name, folder))
    products.use_in(loaded.model)
    with torch.inference_mode():
        vectors = {
            name: last_tokens(loaded, [prompt.replace("{}", text) for text in texts]) for name, prompt in PROMPTS.items()
        }
        joined = torch.tensor(loaded.tokenizer.encode("\n\n".join(texts)).ids)
        ids = joined[: len(joined) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)[:ROWS]
        head = loaded.model.get_input_embeddings().weight  # tied, as in all models that this is for
        logits = [
            products.linear(loaded.model(input_ids=row[None], use_cache=False).last_hidden_state[0], head)
            .log_softmax(-1)
            .half()
            for row in ids
        ]
    return vectors, logits, ids


def last_tokens(loaded: reference.Reference, texts: Sequence[str]) -> torch.Tensor:
    """The last hidden state [texts, hidden] of each text, cut to MAX_TOKENS."""
    import torch

    rows = [encoding.ids[:MAX_TOKENS] for encoding in loaded.tokenizer.encode_batch(list(texts))]
    states = torch.empty(len(rows), loaded.dimension)
    for numbers in reference.batches([len(row) for row in rows], reference.TOKEN_BUDGET):
        longest = max(len(rows[number]) for number in numbers)
        padded = torch.tensor([rows[number] + [0] * (longest - len(rows[number])) for number in numbers])
        ends = torch.tensor([len(rows[number]) - 1 for number in numbers])
        hidden = loaded.model(input_ids=padded, use_cache=False).last_hidden_state
        states[torch.tensor(numbers)] = hidden[torch.arange(len(numbers)), ends]
    return states
