"""Pairs of a query and a document → prompts of a reranker as token ids, cut so that the template's end is never cut.

The gate tokenizes, and vLLM gets token ids: of a text, vLLM would cut the end, where the template has its last lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from qembed.checkpoint.reranker import AFTER, BEFORE, body, head
from qembed.serve.gate.errors import bad
from qembed.serve.gate.rerank_request import Pairs
from qembed.vllm.gate_rules import Rules

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AT_ONCE = 256
"""Pairs tokenized in one call: the library's own result takes several times the memory of the ids."""


class Prompts:
    """Makes prompts by `rules`; `tokenizer` returns the model's tokenizer."""

    def __init__(self, rules: Rules, tokenizer: Callable[[], Tokenizer]) -> None:
        self._rules, self._tokenizer = rules, tokenizer

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The token ids before and after the query and the document."""
        before, after = (self._ids([text])[0] for text in (BEFORE, AFTER))
        return before, after

    def put(self, pairs: Pairs) -> Pairs:
        """`pairs` with the prompts as `inputs`. A document that is too long is cut, as on the model card.

        Raises:
            Refused: 400, a query leaves no room for a document, or a token has no row in the model's token table.
        """
        before, after = self._frame
        room = self._rules.max_model_len - len(before) - len(after)
        heads = self._heads(pairs, room)
        prompts: list[list[int]] = []
        for start in range(0, pairs.count, AT_ONCE):
            indices = range(start, min(start + AT_ONCE, pairs.count))
            bodies = [body(pairs.query(index), pairs.documents[index], pairs.instruction) for index in indices]
            for index, ids in zip(indices, self._ids(bodies), strict=True):
                most = room
                if pairs.document_tokens is not None:
                    most = min(room, heads[pairs.query(index)] + pairs.document_tokens)
                ids = ids[:most]
                if max(ids, default=0) >= self._rules.table_rows:
                    raise bad(
                        f"{pairs.name(index)}, or its query, holds a token that the tokenizer has and the model has not",
                        "token",
                        pairs.fields[1],
                    )
                prompts.append([*before, *ids, *after])
        return replace(pairs, inputs=prompts)

    def _heads(self, pairs: Pairs, room: int) -> dict[str, int]:
        """The tokens of each query with the instruction before it; refuses those that leave no room for a document."""
        texts = {query: head(query, pairs.instruction) for query in dict.fromkeys(pairs.queries)}
        lengths = dict(zip(texts, map(len, self._ids(list(texts.values()))), strict=True))
        for query, length in lengths.items():
            if length >= room:
                name = pairs.fields[0] + (f"[{list(pairs.queries).index(query)}]" if pairs.is_score else "")
                raise bad(
                    f"{name} has {length} tokens with the instruction, which leaves no room for a document: a pair may have "
                    f"{room}. Shorten it",
                    "length",
                    pairs.fields[0],
                )
        return lengths

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer().encode_batch(texts, add_special_tokens=False)]
