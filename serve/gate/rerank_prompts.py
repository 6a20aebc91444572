"""Pairs of a query and a document → prompts of a reranker as token ids, cut so that the template's end is never cut.

The gate tokenizes, and vLLM gets token ids: of a text, vLLM would cut the end, where the template has its last lines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from qembed.checkpoint.rerank_template import Template
from qembed.checkpoint.reranker import body, head
from qembed.serve.gate.errors import bad
from qembed.serve.gate.rerank_request import Pairs
from qembed.vllm.gate_rules import Rules

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AT_ONCE = 256
"""Pairs tokenized in one call: the library's own result takes several times the memory of the ids."""


class Prompts:
    """Makes prompts by `rules`; `tokenizer` returns the model's tokenizer, which nothing else may use."""

    def __init__(self, rules: Rules, tokenizer: Callable[[], Tokenizer]) -> None:
        self._rules, self._tokenizer = rules, tokenizer
        self._lock = threading.Lock()
        self._loaded: Template | None = None

    @property
    def _template(self) -> Template:
        with self._lock:  # requests are read in several threads, and a template changes its tokenizer
            if self._loaded is None:
                self._loaded = Template(self._tokenizer(), self._rules.max_model_len)
            return self._loaded

    def put(self, pairs: Pairs) -> Pairs:
        """`pairs` with the prompts as `inputs`. A document that is too long is cut, as on the model card.

        Raises:
            Refused: 400, a query leaves no room for a document, or a token has no row in the model's token table.
        """
        template = self._template
        heads = self._heads(pairs, template)
        prompts: list[list[int]] = []
        for start in range(0, pairs.count, AT_ONCE):
            indices = range(start, min(start + AT_ONCE, pairs.count))
            bodies = [body(pairs.query(index), pairs.documents[index], pairs.instruction) for index in indices]
            for index, ids in zip(indices, template.encode(bodies), strict=True):
                if pairs.document_tokens is not None:
                    ids = ids[: heads[pairs.query(index)] + pairs.document_tokens]
                prompt = template.prompt(ids)
                if max(prompt) >= self._rules.table_rows:
                    raise bad(
                        f"{pairs.name(index)}, or its query, holds a token that the tokenizer has and the model has not",
                        "token",
                        pairs.fields[1],
                    )
                prompts.append(prompt)
        return replace(pairs, inputs=prompts)

    @staticmethod
    def _heads(pairs: Pairs, template: Template) -> dict[str, int]:
        """The tokens of each query with the instruction before it; refuses those that leave no room for a document."""
        texts = {query: head(query, pairs.instruction) for query in dict.fromkeys(pairs.queries)}
        lengths = dict(zip(texts, map(len, template.encode(list(texts.values()))), strict=True))
        for query, length in lengths.items():
            if length >= template.room:
                name = pairs.fields[0] + (f"[{list(pairs.queries).index(query)}]" if pairs.is_score else "")
                raise bad(
                    f"{name} has {length} tokens with the instruction, which leaves no room for a document: a pair may have "
                    f"{template.room}. Shorten it",
                    "length",
                    pairs.fields[0],
                )
        return lengths
