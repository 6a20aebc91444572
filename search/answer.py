"""Search results: the rows of an index nearest to a question, optionally reordered by a reranker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qembed import rerank
from qembed.checkpoint.find import find
from qembed.errors import BadInput
from qembed.search.corpus import ID
from qembed.search.nearest import WIDTH, nearest
from qembed.search.store import Store

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Hit:
    """A result: id, cosine with the question, score of the reranker, and the other columns."""

    id: str
    score: float
    rerank: float | None
    columns: dict[str, Any]


def width(store: Store, nprobe: int | None, ef_search: int | None, *, exact: bool) -> int | None:
    """The search width: the user's, or the smallest with enough recall as `qembed index` measured it; None: exact search.

    Raises:
        BadInput: the option belongs to another kind of index, or contradicts `exact`.
    """
    options = {"nprobe": nprobe, "ef_search": ef_search}
    set_options = [name for name, value in options.items() if value is not None]
    if exact and set_options:
        raise BadInput(f"--exact compares with every vector; omit --{set_options[0].replace('_', '-')}")
    for name in set_options:
        if name != WIDTH.get(store.kind):
            raise BadInput(f"--{name.replace('_', '-')}: {store.path} is {store.kind}, which has no such setting")
    if exact or store.kind == "flat":
        return None
    return options[WIDTH[store.kind]] or int(store.about["width"])


def hits(store: Store, questions: NDArray[np.float32], depth: int, width: int | None) -> list[list[Hit]]:
    """The `depth` nearest rows of each of `questions` [q, d], best first; fewer if a narrow search finds no more.

    `width` is the search width (function `width`).
    """
    scores, rows = nearest(store.index, store.kind, questions, depth, width)
    distinct_rows = sorted({int(row) for row in rows.flat if row >= 0})
    values = store.entries(distinct_rows, [ID, *store.columns]) if distinct_rows else []
    entries = dict(zip(distinct_rows, values, strict=True))
    answers = []
    for cosines, places in zip(scores, rows, strict=True):
        pairs = [(float(cosine), dict(entries[int(row)])) for cosine, row in zip(cosines, places, strict=True) if row >= 0]
        answers.append([Hit(str(columns.pop(ID)), cosine, None, columns) for cosine, columns in pairs])
    return answers


def text_column(store: Store, name: str | None) -> str | None:
    """The column with the texts: `name`, else `text`, else the only column of strings; None if there is none.

    Raises:
        BadInput: the column `name` does not exist or holds no strings.
    """
    if name is not None:
        if name not in store.texts:
            raise BadInput(f"--text-column {name}: {store.path} keeps {', '.join(store.texts) or 'no texts'}")
        return name
    if "text" in store.texts:
        return "text"
    return store.texts[0] if len(store.texts) == 1 else None


def reranker(name: str, api_key: str | None = None) -> rerank.Reranker:
    """The Qwen3-Reranker `name`, given by hub id, folder, or URL of a vLLM server.

    Raises:
        BadInput: it is not a Qwen3-Reranker.
    """
    return rerank.through_server(name, api_key) if "://" in name else rerank.through_transformers(find(name))


def reranked(
    answers: Sequence[Sequence[Hit]],
    texts: Sequence[str],
    column: str,
    model: rerank.Reranker,
    instruction: str | None,
    progress: Console,
) -> list[list[Hit]]:
    """Each question's hits sorted by the score that `model` gives to (question, text of the hit); ties keep their order.

    Raises:
        BadInput: a hit has no text in `column`.
    """
    passages: list[str] = []
    pairs: list[tuple[int, int]] = []
    for place, answer in enumerate(answers):
        for hit in answer:
            text = hit.columns.get(column)
            if not isinstance(text, str):
                raise BadInput(f"--rerank: row {hit.id} has no text in the column {column}; --text-column names another")
            pairs.append((place, len(passages)))
            passages.append(text)
    if not pairs:
        return [list(answer) for answer in answers]
    scores = iter(rerank.scoring(model, instruction, None, progress)(texts, passages, pairs))
    scored = [[Hit(hit.id, hit.score, float(next(scores)), hit.columns) for hit in answer] for answer in answers]
    return [sorted(answer, key=lambda hit: -(hit.rerank or 0.0)) for answer in scored]
