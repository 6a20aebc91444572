"""The body of a request for scores → validated and cleaned pairs of a query and a document. Pure functions.

Two shapes: Cohere's and Jina's, as vLLM has them too (a query, documents), and vLLM's scores of texts with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qembed.serve.gate import request
from qembed.serve.gate.errors import bad, quoted
from qembed.serve.gate.json_numbers import whole
from qembed.serve.gate.request import Batch
from qembed.serve.gate.unsupported import OF_SCORES, check_supported
from qembed.text.cleaning import has_surrogate
from qembed.text.texts import model_input
from qembed.vllm.gate_rules import Rules

RERANK = ("/v1/rerank", "/rerank", "/v2/rerank")
SCORE = "/v1/score"
SIDES = (("text_1", "text_2"), ("queries", "documents"))
"""The fields of a request for scores: vLLM's two names for queries and for documents."""
COMMON = ("model", "user", "instruction", "max_tokens_per_doc")
KNOWN = {
    "rerank": (*COMMON, "query", "documents", "top_n", "return_documents"),
    "score": (*COMMON, *(name for names in SIDES for name in names)),
}
STRINGS = 4
"""Strings, lists and objects that a pair may have in the body: an object {"text": …} for each, on both sides."""
PROMPT_BYTES = 12
"""About the bytes of memory that a character of a pair takes as token ids: a list has 36 for each."""
SHARE = 4
"""The characters of all pairs are at most --max-body divided by this, so that their token ids stay within memory."""


@dataclass(frozen=True)
class Pairs(Batch):
    """A valid request for scores; `inputs` are the prompts as token ids, once the tokenizer has made them.

    Attributes:
        queries: one for all documents, or one for each, cleaned.
        documents: cleaned.
        instruction: the task that the reranker judges by.
        fields: the names of both sides in the request, for messages.
        document_tokens: tokens that each document is cut to; None: to what fits.
        originals: documents as they were sent, for the answer; empty if they are not to be in it.
        top_n: the number of results; None: all, and for scores all in the request's order.
        is_score: whether the answer is a list of scores.
    """

    queries: Sequence[str] = ()
    documents: Sequence[str] = ()
    instruction: str = ""
    fields: tuple[str, str] = ("query", "documents")
    document_tokens: int | None = None
    originals: Sequence[str] = ()
    top_n: int | None = None
    is_score: bool = False

    @property
    def count(self) -> int:
        """The number of pairs."""
        return len(self.documents)

    @property
    def texts(self) -> Sequence[str]:
        """The texts of the request, for the log."""
        return [*self.queries, *self.documents]

    @property
    def characters(self) -> int:
        """Characters of all pairs: a query that all documents share counts for each."""
        times = self.count if len(self.queries) == 1 else 1
        queries = times * sum(map(len, self.queries)) + self.count * len(self.instruction)
        return queries + sum(map(len, self.documents))

    def query(self, index: int) -> str:
        """The query of the pair at `index`."""
        return self.queries[index if len(self.queries) > 1 else 0]

    def name(self, index: int) -> str:
        """The name of the document at `index` in the request."""
        return f"{self.fields[1]}[{index}]"


def read(raw: bytes, rules: Rules, path: str) -> Pairs:
    """Validate the body `raw` of a request to `path`.

    Raises:
        Refused: 400, the request is invalid or exceeds the rules; 404, its model's name is too long to be one.
    """
    request.check_counts(raw, rules, STRINGS)
    content = request.parse(raw)
    is_score = path == SCORE
    request.check_names(content, KNOWN["score" if is_score else "rerank"])
    check_supported(content, OF_SCORES)
    request.check_strings(content, rules, ("model", "user", "instruction"))
    fields = _fields(content) if is_score else ("query", "documents")
    queries = _texts(content, fields[0], rules) if is_score else [_query(content)]
    documents = _texts(content, fields[1], rules)
    if len(queries) not in (1, len(documents)):
        raise bad(
            f"{fields[0]} has {len(queries)} texts and {fields[1]} {len(documents)}; give one, or as many", "batch", fields[0]
        )
    instruction = _cleaned(content.get("instruction") or rules.instruction or "", "instruction", rules)
    shown = not is_score and _flag(content, "return_documents", default=True)
    pairs = Pairs(
        inputs=(),
        body={name: content[name] for name in ("model", "user") if content.get(name) is not None},
        encoding="float",
        queries=[_cleaned(text, _name(fields[0], index, is_score), rules) for index, text in enumerate(queries)],
        documents=[_cleaned(text, f"{fields[1]}[{index}]", rules) for index, text in enumerate(documents)],
        instruction=instruction,
        fields=fields,
        document_tokens=_number(content, "max_tokens_per_doc", least=1),
        originals=documents if shown else (),
        top_n=None if is_score else _number(content, "top_n", least=0) or None,
        is_score=is_score,
    )
    if pairs.characters > rules.max_body // SHARE:
        raise bad(
            f"the pairs have {pairs.characters} characters in all, the query counted for each document; a request may have "
            f"{rules.max_body // SHARE} (--max-body divided by {SHARE})",
            "batch",
            fields[1],
        )
    return pairs


def _fields(content: Mapping[str, Any]) -> tuple[str, str]:
    """The names under which a request for scores gives its two sides."""
    return next((names for names in SIDES if any(content.get(name) is not None for name in names)), SIDES[0])


def _query(content: Mapping[str, Any]) -> str:
    query = _text(content.get("query"))
    if query is None:
        raise bad("query is missing" if content.get("query") is None else "query is not a text", "type", "query")
    return query


def _texts(content: Mapping[str, Any], field: str, rules: Rules) -> list[str]:
    """The texts of `field`: a text, or a list of texts or of objects {"text": …}."""
    value = content.get(field)
    if value is None:
        raise bad(f"{field} is missing", "type", field)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise bad(f"{field} is an empty list", "empty", field)
    if len(items) > rules.max_batch:
        raise bad(f"{field} has {len(items)} texts; a request may have {rules.max_batch} (--max-client-batch)", "batch", field)
    texts: list[str] = []
    for index, item in enumerate(items):
        text = _text(item)
        if text is None:
            raise bad(f"{field}[{index}] is neither a text nor an object with a text", "type", field)
        texts.append(text)
    return texts


def _text(value: Any) -> str | None:
    text = value.get("text") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _cleaned(text: str, name: str, rules: Rules) -> str:
    """`text`, which is called `name`, as the model reads it."""
    field = name.partition("[")[0]
    if has_surrogate(text):
        raise bad(f"{name} holds half of a surrogate pair, which is not a character", "surrogate", field)
    cleaned = model_input(text, cleaned=rules.clean)
    if not cleaned.strip():
        detail = " after invisible characters are removed" if text.strip() else ""
        raise bad(f"{name} is empty{detail}", "empty", field)
    return cleaned[: request.LONGEST_TOKEN * rules.max_model_len]


def _name(field: str, index: int, is_score: bool) -> str:
    return f"{field}[{index}]" if is_score else field


def _number(content: Mapping[str, Any], name: str, *, least: int) -> int | None:
    """The whole number `name` of a request; None if it has none."""
    value = whole(content.get(name))
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        raise bad(f"{name} is {quoted(value)}; give a whole number from {least}", "type", name)
    return value


def _flag(content: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(f"{name} is neither true nor false", "type", name)
    return default if value is None else value
