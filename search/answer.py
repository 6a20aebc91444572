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
    """A result: id, cosine with the question, score of the reranker, and kept columns."""

    id: str
    score: float
    rerank: float | None
    columns: dict[str, Any]


def width(store: Store, nprobe: int | None, ef_search: int | None, *, exact: bool) -> int | None:
    """The search width: the one given, or the one that `qembed index` measured as enough; None compares with every vector.

    Raises:
        BadInput: the option belongs to another kind of index, or contradicts `exact`.
    """
    asked = {"nprobe": nprobe, "ef_search": ef_search}
    given = [name for name, value in asked.items() if value is not None]
    if exact and given:
        raise BadInput(f"--exact compares with every vector; omit --{given[0].replace('_', '-')}")
    for name in given:
        if name != WIDTH.get(store.kind):
            raise BadInput(f"--{name.replace('_', '-')}: {store.path} is {store.kind}, which has no such setting")
    if exact or store.kind == "flat":
        return None
    return asked[WIDTH[store.kind]] or int(store.about["width"])


def hits(store: Store, questions: NDArray[np.float32], depth: int, look: int | None) -> list[list[Hit]]:
    """The `depth` nearest rows of each of `questions` [q, d], best first; fewer if a narrow search finds no more."""
    scores, rows = nearest(store.index, store.kind, questions, depth, look)
    found = sorted({int(row) for row in rows.flat if row >= 0})
    entries = dict(zip(found, store.entries(found, [ID, *store.columns]), strict=True)) if found else {}
    answers = []
    for cosines, places in zip(scores, rows, strict=True):
        pairs = [(float(cosine), dict(entries[int(row)])) for cosine, row in zip(cosines, places, strict=True) if row >= 0]
        answers.append([Hit(str(columns.pop(ID)), cosine, None, columns) for cosine, columns in pairs])
    return answers


def text_column(store: Store, asked: str | None) -> str | None:
    """The column with the texts: the one given, `text`, or the only column of strings; None if there is none.

    Raises:
        BadInput: the given column does not exist or holds no strings.
    """
    if asked is not None:
        if asked not in store.texts:
            raise BadInput(f"--text-column {asked}: {store.path} keeps {', '.join(store.texts) or 'no texts'}")
        return asked
    if "text" in store.texts:
        return "text"
    return store.texts[0] if len(store.texts) == 1 else None


def reranker(named: str, api_key: str | None = None) -> rerank.Reranker:
    """The Qwen3-Reranker `named` by hub id, folder, or URL of a vLLM server.

    Raises:
        BadInput: it is not a Qwen3-Reranker.
    """
    return rerank.through_server(named, api_key) if "://" in named else rerank.through_transformers(find(named))


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
    found = [[Hit(hit.id, hit.score, float(next(scores)), hit.columns) for hit in answer] for answer in answers]
    return [sorted(answer, key=lambda hit: -(hit.rerank or 0.0)) for answer in found]
