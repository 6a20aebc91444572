"""Qwen3-Reranker after a retriever: reads query and passage together (`qembed.checkpoint.reranker`), and scores them.

By transformers as the model card does it, by `qembed serve`, or by a stock vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.rerank_template import Template
from qembed.checkpoint.reranker import AFTER, ANSWERS, BEFORE, LONGEST, body
from qembed.checkpoint.reranker import Reranker as Description
from qembed.checkpoint.score_row import score_row
from qembed.command.progress import reporter
from qembed.errors import BadInput, QembedError
from qembed.vectors import cache as caches
from qembed.vectors import reference

if TYPE_CHECKING:
    import openai
    from rich.console import Console

CHUNK = 64
ALTERNATIVES = 20
TIMEOUT = 300.0

Pairs = Sequence[tuple[str, str]]
"""A query and a passage each."""
Scorer = Callable[[Pairs, str | None], NDArray[np.float32]]
"""Scores of pairs [n] within 0…1 under an instruction (None: the default one)."""
Rerank = Callable[[Sequence[str], Sequence[str], Sequence[tuple[int, int]]], NDArray[np.float64]]


@dataclass(frozen=True)
class Reranker:
    """A model that scores pairs. `open` loads it, as a context manager of a `Scorer`; `identity` is its cache key."""

    name: str
    identity: Mapping[str, Any]
    open: Callable[[], Any]


def scoring(reranker: Reranker, instruction: str | None, folder: Path | None, progress: Console) -> Rerank:
    """A function that scores (query, passage) pairs, with scores cached in `folder` (None: not beyond the call)."""

    def rerank(queries: Sequence[str], passages: Sequence[str], pairs: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        texts = [(queries[query], passages[row]) for query, row in pairs]
        digests = [caches.digest(body(*pair, instruction)) for pair in texts]
        with caches.opened(folder, reranker.identity) as cache:
            known = cache.known(digests)
            unscored = {digest: pair for digest, pair in zip(digests, texts, strict=True) if digest not in known}
            if unscored:
                _score_into(cache, unscored, instruction, reranker, progress)
            scores = np.empty((len(texts), 1), np.float32)
            cache.fill(digests, scores)
        return scores[:, 0].astype(np.float64)

    return rerank


def _score_into(
    cache: caches.Cache,
    pairs: Mapping[bytes, tuple[str, str]],
    instruction: str | None,
    reranker: Reranker,
    progress: Console,
) -> None:
    """Score `pairs` (by digest), longest first so that lack of memory shows at once, and store each chunk's scores."""
    longest_first = sorted(pairs.items(), key=lambda item: -sum(map(len, item[1])))
    description = f"reranker: {reranker.name}"
    with reporter(f"{description}, opening", progress) as shown, reranker.open() as score:
        for start in range(0, len(longest_first), CHUNK):
            shown.steps(description, start, len(longest_first), "pairs")
            chunk = longest_first[start : start + CHUNK]
            cache.put([digest for digest, _ in chunk], score([pair for _, pair in chunk], instruction)[:, None])


def through_transformers(checkpoint: Checkpoint) -> Reranker:
    """A Qwen3-Reranker checkpoint run by transformers, in float16 on a GPU and in float32 on a CPU.

    Raises:
        BadInput: it is no such model.
    """
    from qembed.vectors import sources

    checkpoint = replace(checkpoint, task="rerank")
    description = checkpoint.reranker
    assert description is not None
    dtype = sources.transformers_dtype(checkpoint)
    identity = {**sources.transformers(checkpoint).identity, "task": "rerank"}
    return Reranker(checkpoint.name, identity, lambda: _transformers(checkpoint, description, dtype))


def through_server(url: str, api_key: str | None = None) -> Reranker:
    """A Qwen3-Reranker on a server: `qembed serve`, or a vLLM with it as a classifier (`/classify`) or generating.

    Raises:
        BadInput: nothing answers there, or it is no such server.
    """
    from qembed.client import about
    from qembed.vectors import sources

    server = sources.server(url, api_key)
    identity = {**server.identity, "task": "rerank"}
    model, base = str(identity["model"]), str(identity["url"])
    scores = about.reranks(url, api_key)
    return Reranker(f"{model} at {url}", identity, lambda: _server(base, model, server.limit, api_key, scores=scores))


@contextmanager
def _transformers(checkpoint: Checkpoint, description: Description, dtype: str) -> Iterator[Scorer]:
    """Load `checkpoint`, which is described by `description`, in `dtype`; INT4 weights are dequantized."""
    import torch

    from qembed.vectors import sources

    device = "cuda" if sources.has_gpu() else "cpu"
    loaded = reference.load(checkpoint, dtype, device)
    row = score_row(checkpoint, description).to(loaded.device)
    template = Template(checkpoint.tokenizer(), description.trunk.context)
    if template.room < 1:
        raise BadInput(f"{checkpoint.folder}: its context has no room for a reranker's prompt")

    def score(pairs: Pairs, instruction: str | None = None) -> NDArray[np.float32]:
        ids = [template.prompt(tokens) for tokens in template.encode([body(*pair, instruction) for pair in pairs])]
        scores = np.empty(len(ids), np.float32)
        for rows in reference.batches([len(tokens) for tokens in ids], reference.TOKEN_BUDGET):
            longest = max(len(ids[row]) for row in rows)
            padded = torch.zeros((len(rows), longest), dtype=torch.long)
            for place, index in enumerate(rows):
                padded[place, : len(ids[index])] = torch.tensor(ids[index])
            last = torch.tensor([len(ids[index]) - 1 for index in rows], device=device)
            with torch.inference_mode():
                hidden = loaded.model(input_ids=padded.to(device), use_cache=False).last_hidden_state
                difference = hidden[torch.arange(len(rows), device=device), last].float() @ row
                scores[rows] = difference.sigmoid().cpu().numpy()
        return scores

    yield score


@contextmanager
def _server(base: str, model: str, limit: int | None, api_key: str | None, *, scores: bool) -> Iterator[Scorer]:
    """Connect to the server at `base`, whose context holds `limit` tokens (None: unknown); `scores`: it is `qembed serve`."""
    from qembed.client import embeddings

    with embeddings.connected(base, TIMEOUT, api_key) as api:
        server = _RerankServer(api, base, model, limit)
        yield server.score_pairs if scores else server.score


class _RerankServer:
    """A connection to a server with a reranker: one that scores pairs, or a vLLM with a classifier, or else generating.

    `/tokenize` and `/detokenize` are vLLM's; other servers answer 404 there.
    """

    def __init__(self, api: openai.OpenAI, base: str, model: str, limit: int | None) -> None:
        self._api, self._base, self._model, self._limit = api, base, model, limit
        self._generates = False

    def score_pairs(self, pairs: Pairs, instruction: str | None = None) -> NDArray[np.float32]:
        """P(yes) [n] of `pairs` as `qembed serve` answers: it puts the template around them."""
        queries, documents = map(list, zip(*pairs, strict=True))
        request = {"model": self._model, "text_1": queries, "text_2": documents, "instruction": instruction}
        data = sorted(self._post("v1/score", request)["data"], key=lambda item: item["index"])
        return _checked(np.array([item["score"] for item in data], np.float32), queries, self._base)

    def score(self, pairs: Pairs, instruction: str | None = None) -> NDArray[np.float32]:
        """P(yes) [n] of `pairs`. The first 404 or 405 of `/classify` switches to generating for good."""
        import openai

        prompts = [self._prompt(body(*pair, instruction)) for pair in pairs]
        if not self._generates:
            try:
                return _checked(self._classify(prompts), prompts, self._base)
            except openai.APIStatusError as error:
                if error.status_code not in (404, 405):
                    raise
                self._generates = True
        return _checked(self._generate(prompts), prompts, self._base)

    def _classify(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        answer = self._post("classify", {"model": self._model, "input": list(prompts)})
        probabilities = [item["probs"] for item in sorted(answer["data"], key=lambda item: item["index"])]
        # With one label it is P(yes); with two they are P(no) and P(yes).
        return np.array([labels[-1] for labels in probabilities], np.float32)

    def _generate(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        # Newer vLLMs report the tokens in `logprob_token_ids`, however improbable; other servers report the likeliest ones.
        extra_body = {"logprob_token_ids": self._answer_tokens} if self._answer_tokens else None
        answer = self._api.completions.create(
            model=self._model, prompt=list(prompts), max_tokens=1, temperature=0, logprobs=ALTERNATIVES, extra_body=extra_body
        )
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        return np.array([_yes(choice.logprobs.top_logprobs[0]) for choice in choices], np.float32)  # type: ignore[union-attr,index]

    @cached_property
    def _answer_tokens(self) -> list[int]:
        """The token ids of ANSWERS; empty if the server does not tokenize, or has no single token for each."""
        import openai

        try:
            encoded = [self._tokens(word) for word in ANSWERS]
        except openai.NotFoundError:
            return []
        return [tokens[0] for tokens in encoded] if all(len(tokens) == 1 for tokens in encoded) else []

    def _prompt(self, text: str) -> str:
        """The prompt around the body `text`, cut so that one generated token still fits into the server's context.

        On servers without `/tokenize` it stays uncut: they report a text that is too long themselves.
        """
        import openai

        prompt = f"{BEFORE}{text}{AFTER}"
        most = min(LONGEST, self._limit or LONGEST) - 1
        if len(prompt.encode()) <= most:  # a token has at least one byte
            return prompt
        try:
            room = most - len(self._tokens(BEFORE)) - len(self._tokens(AFTER))
            ids = self._tokens(text)
            if not len(ids) > room > 0:
                return prompt
            answer = self._post("detokenize", {"model": self._model, "tokens": ids[:room]})
        except openai.NotFoundError:
            return prompt
        return f"{BEFORE}{answer['prompt']}{AFTER}"

    def _tokens(self, text: str) -> list[int]:
        answer = self._post("tokenize", {"model": self._model, "prompt": text, "add_special_tokens": False})
        return list(answer["tokens"])

    def _post(self, path: str, request: Mapping[str, Any]) -> Any:
        return self._api.post(f"{self._base}/{path}", body=request, cast_to=object)


def _yes(alternatives: Mapping[str, float]) -> float:
    """P(yes) of yes and no from the log-probabilities of the most probable tokens; a missing one gets the lowest of them."""
    least = min(alternatives.values())
    no, yes = (alternatives.get(word, least) for word in ANSWERS)
    if not any(word in alternatives for word in ANSWERS):
        raise QembedError("the reranker's server answers neither yes nor no: is it a Qwen3-Reranker?")
    return float(1 / (1 + np.exp(no - yes)))


def _checked(scores: NDArray[np.float32], prompts: Sequence[str], url: str) -> NDArray[np.float32]:
    """`scores` if there is a finite one per prompt."""
    if len(scores) != len(prompts) or not np.isfinite(scores).all():
        raise QembedError(f"{url}: {len(scores)} scores for {len(prompts)} pairs, or one that is no number")
    return scores
