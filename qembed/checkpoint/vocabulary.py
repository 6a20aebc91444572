"""Tokens of a tokenizer that have no row in the model's token table.

A fine-tuned checkpoint often has a token added to the tokenizer alone. The first text with such a token reads beyond the end of
the table, which ends an engine. So these tokens are looked for before anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
SHOWN = 5


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer beside the token table of its model.

    Attributes:
        tokenizer: turns a text into token ids.
        rows: rows of the token table.
        beyond: ids of tokens without a row, by token.
    """

    tokenizer: Tokenizer
    rows: int
    beyond: Mapping[str, int]

    def token_beyond(self, text: str) -> str | None:
        """The first token of `text` that has no row; None if every token has one. Costs nothing where `beyond` is empty."""
        if not self.beyond:
            return None
        encoding = self.tokenizer.encode(text)
        return next((token for token, id_ in zip(encoding.tokens, encoding.ids, strict=True) if id_ >= self.rows), None)

    def warning(self) -> str | None:
        """A line that names the tokens without a row; None if there are none."""
        if not self.beyond:
            return None
        names = sorted(self.beyond, key=self.beyond.__getitem__)
        shown = ", ".join(f"{name!r} (id {self.beyond[name]})" for name in names[:SHOWN])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return (
            f"the tokenizer has tokens beyond the {self.rows} rows of the token table: {shown}{more}; the model cannot read "
            "texts that hold them: remove the tokens from the tokenizer, or resize the model's table (resize_token_embeddings)"
        )


def added_by_config(known: Mapping[str, int], config: Mapping[str, Any]) -> list[str]:
    """The tokens of tokenizer_config.json that tokenizer.json lacks, in the order in which transformers adds them."""
    named: list[Any] = []
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        named += [decoder[id_] for id_ in sorted(decoder, key=lambda id_: (len(id_), id_))]
    named += [config.get(name) for name in NAMED_TOKENS]
    for name in TOKEN_LISTS:
        tokens = config.get(name)
        named += list(tokens.values()) if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else []
    return [token for token in dict.fromkeys(_contents(named)) if token not in known]


def _contents(tokens: Iterable[Any]) -> Iterable[str]:
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content:
            yield content
