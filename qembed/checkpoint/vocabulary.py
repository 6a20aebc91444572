"""Tokens of a tokenizer that have no row in the model's token table.

A fine-tuned checkpoint often has a token added to the tokenizer alone. The first text with such a token reads beyond the end of
the table, which ends an engine. So these tokens are looked for before anything is computed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
SHOWN = 5
MOST_GROWTH = 1000
"""Characters that a tokenizer's normalizer may make of one, at most: NFKD makes 18."""


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


def token_ids(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """The token ids of `text`; `name` is the tokenizer's in messages.

    Raises:
        BadInput: the tokenizer fails on this text, as one whose regular expression exceeds the limit of its engine.
    """
    with panics(name):
        return list(tokenizer.encode(text).ids)


@contextmanager
def panics(name: str) -> Iterator[None]:
    """Turn a panic of the tokenizers library in the block into one line; Rust would print several on stderr.

    Raises:
        BadInput: a tokenizer, which `name` names, fails on a text.
    """
    sys.stderr.flush()
    original = os.dup(2)
    panicked = False
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            if panicked:
                raise BadInput(failed(error, name)) from None
            raise
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            printed.seek(0)
            if not panicked and (others := printed.read()):
                os.write(2, others)


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a failure inside the tokenizers library: a panic in Rust, which is no Exception in Python."""
    return type(error).__name__ == "PanicException"


def failed(error: BaseException, name: str) -> str:
    """The message for a tokenizer that panics; `name` is its folder."""
    return (
        f"{name}: the tokenizer fails on a text: {' '.join(str(error).split())[:200]}; tokenizer.json is damaged, or not usable"
    )


def check_settings(config: Mapping[str, Any], load: Callable[[], Tokenizer], path: Path) -> None:
    """Check that the tokenizer that `load` reads from tokenizer.json does what tokenizer_config.json, in `path`, says of it.

    transformers passes over these settings if there is a tokenizer.json, or runs the model's code, without a word.

    Raises:
        BadInput: it adds a token fewer than it is said to, or comes with code.
    """
    code = config.get("auto_map")
    if isinstance(code, dict) and code.get("AutoTokenizer"):
        raise BadInput(
            f"{path}: the tokenizer comes with code of its own (auto_map), which is not run; if tokenizer.json gives the same "
            "tokens, remove auto_map"
        )
    if config.get("truncation_side", "right") != "right":
        raise BadInput(
            f"{path}: truncation_side {str(config['truncation_side'])[:60]!r} is not supported: texts are cut at their end"
        )
    ends = {key: end for key, end in (("add_bos_token", 0), ("add_eos_token", -1)) if config.get(key) is True}
    if not ends:
        return
    mask = load().encode("a").special_tokens_mask
    for key, end in ends.items():
        if not mask or not mask[end]:
            raise BadInput(
                f"{path}: {key} is true, but tokenizer.json adds no token {'before' if end == 0 else 'after'} a text; add it "
                "to the post_processor in tokenizer.json, or remove the setting if the model was trained without it"
            )


def lower_casing(normalizer: Any) -> Any:
    """A normalizer (None: none) of the tokenizers library with lower-casing before it, as sentence-transformers adds it."""
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.Lowercase(), *([] if normalizer is None else [normalizer])])


def check_normalizer(tokenizer: Tokenizer, path: Path) -> None:
    """Check that the normalizer of the tokenizer in `path` makes no text much longer.

    Raises:
        BadInput: it could fill the memory from a short text.
    """
    if tokenizer.normalizer is None:
        return
    growth = math.prod(_growth(json.loads(tokenizer.normalizer.__getstate__())))
    if growth > MOST_GROWTH:
        raise BadInput(f"{path}: its normalizer makes up to {growth:,} characters of one; at most {MOST_GROWTH:,} are allowed")


def _growth(normalizer: Any) -> Iterator[int]:
    """The characters that each step of a normalizer can make of one."""
    if isinstance(normalizer, dict):
        for name, value in normalizer.items():
            if name in ("content", "prepend") and isinstance(value, str):
                yield max(1, len(value))
            else:
                yield from _growth(value)
    elif isinstance(normalizer, list):
        for part in normalizer:
            yield from _growth(part)
