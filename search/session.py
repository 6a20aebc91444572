"""Answers questions from an index: with models loaded once for many questions, or with one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed import rerank
from qembed.command.progress import reporter
from qembed.search import answer, query
from qembed.search.store import Store

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Search:
    """How an index is searched.

    Attributes:
        store: the index.
        top: number of results for each question.
        depth: number of nearest rows that are looked up; more than `top` where a reranker chooses among them.
        width: search width, see `answer.width`.
        column: the column with the texts; None: there is none.
        reranker: reorders the nearest rows; None: cosine decides.
    """

    store: Store
    top: int
    depth: int
    width: int | None
    column: str | None
    reranker: rerank.Reranker | None


Ask = Callable[[Sequence[str]], dict[str, Any]]
"""Answers questions: what `qembed search --json` prints."""


@contextmanager
def opened(search: Search, settings: query.QuestionSettings, progress: Console) -> Iterator[Ask]:
    """Load the models; inside the block the yielded function answers questions with them.

    Raises:
        BadInput: a model does not fit the index, or a hit has no text to rerank.
        QembedError: a server or an engine fails.
    """
    with ExitStack() as stack:
        embed = stack.enter_context(query.opened(search.store, settings, progress))
        if (reranker := search.reranker) is not None:
            with reporter(f"reranker: {reranker.name}, opening", progress):
                score = stack.enter_context(reranker.open())
            search = replace(search, reranker=replace(reranker, open=lambda: nullcontext(score)))
        yield lambda texts: _answer(search, texts, embed(texts), settings.instruction, progress)


def answer_once(search: Search, texts: Sequence[str], settings: query.QuestionSettings, progress: Console) -> dict[str, Any]:
    """What an `Ask` answers. The embedder is closed before the reranker is loaded, so that memory holds one of them.

    Raises:
        BadInput, QembedError: as `opened`.
    """
    with query.opened(search.store, settings, progress) as embed:
        vectors = embed(texts)
    return _answer(search, texts, vectors, settings.instruction, progress)


def _answer(
    search: Search, texts: Sequence[str], vectors: NDArray[np.float32], instruction: str | None, progress: Console
) -> dict[str, Any]:
    """The answer to `texts`, whose `vectors` are [len(texts), d]."""
    store, model = search.store, search.reranker
    answers = answer.hits(store, vectors, search.depth, search.width)
    if model is not None and search.column is not None:
        answers = answer.reranked(answers, texts, search.column, model, instruction, progress)
    return {
        "index": str(store.path),
        "kind": store.kind,
        "width": search.width,
        "model": store.model,
        "reranker": model.name if model else None,
        "text_column": search.column,
        "columns": list(store.columns),
        "queries": [
            {"text": text, "hits": [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits[: search.top], 1)]}
            for text, hits in zip(texts, answers, strict=True)
        ],
    }
