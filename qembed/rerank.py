"""Qwen3-Reranker after a retriever: reads query and passage together and answers "yes" or "no".

The score is P(yes) of the two answers at the last token (Zhang et al. 2025, "Qwen3 Embedding", section 2; prompt as on the
model card).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput, QembedError
from qembed.text.prompts import DEFAULT_INSTRUCTION
from qembed.vectors import cache as caches
from qembed.vectors import reference

if TYPE_CHECKING:
    from rich.console import Console

BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
ANSWERS = ("no", "yes")
LONGEST = 8192
CHUNK = 64
ALTERNATIVES = 20
TIMEOUT = 300.0

Scorer = Callable[[Sequence[str]], NDArray[np.float32]]
Rerank = Callable[[Sequence[str], Sequence[str], Sequence[tuple[int, int]]], NDArray[np.float64]]


@dataclass(frozen=True)
class Reranker:
    """A model that scores bodies (`body`): [n] float32 within 0…1. `open` loads it; `identity` is its cache key."""

    name: str
    identity: Mapping[str, Any]
    open: Callable[[], Any]


def body(query: str, passage: str, instruction: str | None = None) -> str:
    """The part of the prompt between BEFORE and AFTER."""
    return f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>: {passage}"


def scoring(reranker: Reranker, instruction: str | None, folder: Path | None, progress: Console) -> Rerank:
    """A function that scores (query, passage) pairs, with scores cached in `folder`."""

    def rerank(queries: Sequence[str], passages: Sequence[str], pairs: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bodies = [body(queries[query], passages[row], instruction) for query, row in pairs]
        digests = [caches.digest(one) for one in bodies]
        with caches.opened(folder, reranker.identity) as kept:
            known = kept.known(digests)
            wanted = sorted(
                {one: text for one, text in zip(digests, bodies, strict=True) if one not in known}.items(),
                key=lambda item: -len(item[1]),
            )
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("pairs"),
                TimeRemainingColumn(),
            )
            if wanted:
                with reranker.open() as score, Progress(*columns, console=progress) as bar:
                    task = bar.add_task(f"reranker: {reranker.name}", total=len(wanted))
                    for start in range(0, len(wanted), CHUNK):
                        part = wanted[start : start + CHUNK]
                        kept.put([one for one, _ in part], score([text for _, text in part])[:, None])
                        bar.advance(task, len(part))
            scores = np.empty((len(bodies), 1), np.float32)
            kept.fill(digests, scores)
        return scores[:, 0].astype(np.float64)

    return rerank


def through_transformers(checkpoint: Checkpoint) -> Reranker:
    """A Qwen3-Reranker checkpoint run by transformers, in float16 on a GPU and in float32 on a CPU.

    Raises:
        BadInput: its tokenizer has no tokens "yes" and "no", so it is no such model.
    """
    from qembed.vectors import sources

    tokenizer = checkpoint.tokenizer()
    answers = [number for word in ANSWERS if (number := tokenizer.token_to_id(word)) is not None]
    if len(answers) < len(ANSWERS):
        raise BadInput(f"{checkpoint.folder}: not a Qwen3-Reranker: its tokenizer has no single token for yes and for no")
    identity = {**sources.transformers(checkpoint).identity, "task": "rerank"}
    return Reranker(checkpoint.name, identity, lambda: _transformers(checkpoint, answers))


def through_server(url: str, api_key: str | None = None) -> Reranker:
    """A Qwen3-Reranker on a vLLM server: as a classifier (`/classify`), or generating (`/v1/completions`).

    Raises:
        BadInput: nothing answers there, or it is no such server.
    """
    from qembed.vectors import sources

    side = sources.server(url, api_key)
    identity = {**side.identity, "task": "rerank"}
    model = str(identity["model"])
    return Reranker(f"{model} at {url}", identity, lambda: _server(str(identity["url"]), model, side.limit, api_key))


@contextmanager
def _transformers(checkpoint: Checkpoint, answers: Sequence[int]) -> Iterator[Scorer]:
    import torch
    from transformers import AutoModelForCausalLM

    from qembed.vectors import sources

    device = "cuda" if sources.has_gpu() else "cpu"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=torch.float16 if device == "cuda" else torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"{checkpoint.folder}: transformers cannot load this reranker: {said}") from error
    model = model.to(device).eval()
    head = model.get_output_embeddings().weight[list(answers)].float()
    tokenizer = checkpoint.tokenizer()
    before, after = (tokenizer.encode(text, add_special_tokens=False).ids for text in (BEFORE, AFTER))
    room = min(LONGEST, int(model.config.max_position_embeddings)) - len(before) - len(after)
    if room < 1:
        raise BadInput(f"{checkpoint.folder}: its context has no room for a reranker's prompt")

    def score(bodies: Sequence[str]) -> NDArray[np.float32]:
        encodings = tokenizer.encode_batch(list(bodies), add_special_tokens=False)
        ids = [[*before, *encoding.ids[:room], *after] for encoding in encodings]
        scores = np.empty(len(ids), np.float32)
        for rows in reference.batches([len(tokens) for tokens in ids], reference.TOKEN_BUDGET):
            longest = max(len(ids[row]) for row in rows)
            padded = torch.zeros((len(rows), longest), dtype=torch.long)
            for place, row in enumerate(rows):
                padded[place, : len(ids[row])] = torch.tensor(ids[row])
            last = torch.tensor([len(ids[row]) - 1 for row in rows], device=device)
            with torch.inference_mode():
                hidden = model.base_model(input_ids=padded.to(device), use_cache=False).last_hidden_state
                logits = hidden[torch.arange(len(rows), device=device), last].float() @ head.T
                scores[rows] = logits.softmax(-1)[:, 1].cpu().numpy()
        return scores

    yield score


@contextmanager
def _server(base: str, model: str, limit: int | None, api_key: str | None) -> Iterator[Scorer]:
    from qembed.client import embeddings

    with embeddings.connected(base, TIMEOUT, api_key) as api:
        import openai

        generates = False

        def classified(prompts: Sequence[str]) -> NDArray[np.float32]:
            answer: Any = api.post(f"{base}/classify", body={"model": model, "input": list(prompts)}, cast_to=object)
            probabilities = [item["probs"] for item in sorted(answer["data"], key=lambda item: item["index"])]
            # One label is P(yes) itself; two are no and yes.
            return np.array([one[-1] for one in probabilities], np.float32)

        def generated(prompts: Sequence[str]) -> NDArray[np.float32]:
            # A vLLM that knows `logprob_token_ids` tells just these two, however improbable; others the most probable ones.
            more = {"logprob_token_ids": numbers} if (numbers := answer_tokens()) else None
            answer = api.completions.create(
                model=model, prompt=list(prompts), max_tokens=1, temperature=0, logprobs=ALTERNATIVES, extra_body=more
            )
            choices = sorted(answer.choices, key=lambda choice: choice.index)
            return np.array([_yes(choice.logprobs.top_logprobs[0]) for choice in choices], np.float32)  # type: ignore[union-attr,index]

        def tokens(text: str) -> list[int]:
            asked = {"model": model, "prompt": text, "add_special_tokens": False}
            answer: Any = api.post(f"{base}/tokenize", body=asked, cast_to=object)
            return list(answer["tokens"])

        @cache
        def answer_tokens() -> list[int]:
            try:
                found = [tokens(word) for word in ANSWERS]
            except openai.NotFoundError:
                return []
            return [one[0] for one in found] if all(len(one) == 1 for one in found) else []

        def fitting(text: str) -> str:
            """The longest beginning of a body that fits into the server's context, with the prompt and one generated token."""
            whole = f"{BEFORE}{text}{AFTER}"
            most = min(LONGEST, limit or LONGEST) - 1
            if len(whole.encode()) <= most:  # a token has a byte at least
                return whole
            try:
                room = most - len(tokens(BEFORE)) - len(tokens(AFTER))
                ids = tokens(text)
                if len(ids) > room > 0:
                    asked = {"model": model, "tokens": ids[:room]}
                    answer: Any = api.post(f"{base}/detokenize", body=asked, cast_to=object)
                    return f"{BEFORE}{answer['prompt']}{AFTER}"
            except openai.NotFoundError:
                pass  # no vLLM: it says itself what is too long for it
            return whole

        def score(bodies: Sequence[str]) -> NDArray[np.float32]:
            nonlocal generates
            prompts = list(map(fitting, bodies))
            if not generates:
                try:
                    return _all(classified(prompts), prompts, base)
                except (openai.NotFoundError, openai.APIStatusError) as error:
                    if error.status_code not in (404, 405):
                        raise
                    generates = True
            return _all(generated(prompts), prompts, base)

        yield score


def _yes(alternatives: Mapping[str, float]) -> float:
    """P(yes) of yes and no from the log-probabilities of the most probable tokens; a missing one gets the lowest of them."""
    least = min(alternatives.values())
    no, yes = (alternatives.get(word, least) for word in ANSWERS)
    if not any(word in alternatives for word in ANSWERS):
        raise QembedError("the reranker's server answers neither yes nor no: is it a Qwen3-Reranker?")
    return float(1 / (1 + np.exp(no - yes)))


def _all(scores: NDArray[np.float32], prompts: Sequence[str], url: str) -> NDArray[np.float32]:
    if len(scores) != len(prompts) or not np.isfinite(scores).all():
        raise QembedError(f"{url}: {len(scores)} scores for {len(prompts)} pairs, or one that is no number")
    return scores
