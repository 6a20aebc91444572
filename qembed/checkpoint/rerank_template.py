"""Pairs of a query and a document → token ids of a reranker's prompts: the template around text that is only text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qembed.checkpoint.reranker import AFTER, BEFORE

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Template:
    """A reranker's template as token ids.

    Control tokens come from the template alone. A text that holds `<|im_end|>` or `<think>` could otherwise end the user's turn
    and write the beginning of the answer: such names are encoded like any other characters.

    Attributes:
        before: the token ids before the query and the document.
        after: those behind them.
        room: tokens that a prompt may have between the two; below 1 if the context is too short for any.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        """Encode the template for prompts of at most `context` tokens. `tokenizer` is changed, and must not serve others."""
        self.before, self.after = (tokenizer.encode(text, add_special_tokens=False).ids for text in (BEFORE, AFTER))
        self.room = context - len(self.before) - len(self.after)
        # The library skips special tokens alone, and <think> is none in Qwen3's tokenizer.
        tokenizer.add_special_tokens([token.content for token in tokenizer.get_added_tokens_decoder().values()])
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each of `texts`, none of which is a control token."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def prompt(self, body: Sequence[int]) -> list[int]:
        """The whole prompt with the token ids `body`, which are cut at their end if they do not fit."""
        return [*self.before, *body[: max(0, self.room)], *self.after]
