"""A request's body → validated, cleaned and prompted texts, and the body that vLLM gets. Pure functions."""

from __future__ import annotations

import codecs
import difflib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from qembed.serve.gate import long_texts
from qembed.serve.gate import prompt as prompts
from qembed.serve.gate.errors import Refused, bad, quoted
from qembed.serve.gate.json_numbers import is_integer, whole
from qembed.serve.gate.long_texts import Count
from qembed.serve.gate.unsupported import check_supported, of_embeddings
from qembed.text.cleaning import has_surrogate, lower_cased
from qembed.text.texts import model_input
from qembed.vllm.gate_rules import Rules

ENCODINGS = ("float", "base64")
LONGEST_TOKEN = 256
"""Upper bound for the characters of one token; the longest are white space."""
KNOWN = (
    *("input", "model", "user", "encoding_format", "dimensions", *prompts.FIELDS),
    *("truncate_prompt_tokens", "truncation_side", "truncate", "truncation", "long_texts", "add_special_tokens", "messages"),
)
NEAR = 0.82
"""Similarity (difflib's ratio) from which a name counts as a misspelt one: "dimension" has 0.95, "encodingFormat" 0.9."""
MAX_NAME = 32
LONGEST_NAME = 1024
"""Characters of a name, such as the model's; vLLM repeats it in its messages."""
SLACK = 1000
"""Strings, lists and objects that a request may have besides its texts; fields that are unknown are ignored."""
PASSED_ON = ("model", "user", "dimensions")
HINT_TOKEN_IDS = (
    "input holds token ids, which may come from another model's tokenizer; send texts (LangChain: "
    "OpenAIEmbeddings(check_embedding_ctx_length=False)), or start the server with --allow-token-ids if they are this model's"
)

NUMBERS = re.compile(rb"\d\s*,\s*\d")

TokenBeyond = Callable[[str], str | None]


@dataclass(frozen=True)
class Batch:
    """A valid request.

    Attributes:
        inputs: a text, a part of one, or its token ids, for each vector that vLLM computes.
        body: the request to vLLM, to be sent as JSON.
        encoding: the encoding that the client asks for, "float" or "base64".
        part_tokens: the tokens of each part, by text, if a text is computed in parts; empty: `inputs` are whole texts.
    """

    inputs: Sequence[str | list[int]]
    body: dict[str, Any]
    encoding: str
    part_tokens: Sequence[Sequence[int]] = ()

    @property
    def count(self) -> int:
        """The number of vectors or scores of the answer."""
        return len(self.part_tokens or self.inputs)

    @property
    def texts(self) -> Sequence[str | list[int]]:
        """The texts of the request, for the log."""
        return self.inputs

    def name(self, index: int) -> str:
        """The name in the request of what `inputs` has at `index`."""
        text = index if not self.part_tokens else bisect_right(list(accumulate(map(len, self.part_tokens))), index)
        return f"input[{text}]"


def read(raw: bytes, rules: Rules, count: Count, token_beyond: TokenBeyond | None = None) -> Batch:
    """Validate the body `raw`. `count` returns the number of tokens of a text, including those that the model appends.

    `token_beyond` returns a token of a text that has no row in the model's token table, or None; it is None itself where every
    token has a row.

    Raises:
        Refused: 400, the request is invalid or exceeds the rules; 404, its model's name is too long to be one.
    """
    check_counts(raw, rules)
    content = parse(raw)
    check_names(content, KNOWN)
    check_supported(content, of_embeddings(rules))
    _check_types(content, rules)
    inputs = _inputs(content.get("input"), rules)
    max_tokens, in_parts = long_texts.handling(content, rules)
    prompt, field = prompts.chosen(content, rules)
    part_tokens: Sequence[Sequence[int]] = ()
    if isinstance(inputs[0], str):
        inputs = [_text(str(text), index, prompt, rules) for index, text in enumerate(inputs)]
    elif prompt and field is not None:
        raise bad("a prompt cannot be put before token ids; send texts", "prompt", field)
    if max_tokens is not None:  # vLLM would tokenize the whole text before it truncates
        inputs = [text[: LONGEST_TOKEN * max_tokens] for text in inputs]
    elif in_parts and isinstance(inputs[0], str):
        inputs, part_tokens = long_texts.in_parts([str(text) for text in inputs], prompt, rules, count)
    else:
        for index, text in enumerate(inputs):
            long_texts.check_length(text, index, rules.max_model_len, count)
    if token_beyond is not None:
        check_tokens(inputs, token_beyond)
    body = {name: whole(content[name]) for name in PASSED_ON if content.get(name) is not None}
    body |= {"input": list(inputs), "encoding_format": "base64"}
    if max_tokens is not None:
        body["truncate_prompt_tokens"] = max_tokens
    if content.get("add_special_tokens") is not None:
        body["add_special_tokens"] = content["add_special_tokens"]
    return Batch(inputs, body, content.get("encoding_format") or "float", part_tokens)


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        Refused: 400, it is not one.
    """
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise bad(f"the request is not UTF-8: byte {error.start} cannot be read", "json", None) from error
    except RecursionError as error:
        raise bad("the request is nested too deeply", "json", None) from error
    except ValueError as error:
        raise bad(f"the request is not JSON: {error}", "json", None) from error
    if not isinstance(value, dict):
        raise bad("the request is not a JSON object", "json", None)
    return value


def check_counts(raw: bytes, rules: Rules, for_each: int = 1) -> None:
    """Refuse a body of far too many values before they are built: a list takes two bytes of JSON and 64 of memory.

    A text may have `for_each` strings, lists and objects.

    Raises:
        Refused: 400.
    """
    most = for_each * rules.max_batch + SLACK
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = unescaped.count(b'"') // 2
    if strings > most:
        raise bad(f"the request has {strings} strings; it may have {rules.max_batch} texts (--max-client-batch)", "batch")
    rest = b"".join(unescaped.split(b'"')[::2])
    lists = rest.count(b"[") + rest.count(b"{")
    if lists > most:
        raise bad(
            f"the request has {lists} lists and objects; it may have {rules.max_batch} texts (--max-client-batch)", "batch"
        )
    if rules.allow_token_ids:
        most = rules.max_batch * (rules.max_model_len + 1) + SLACK
    if (values := rest.count(b",")) > most:
        if not rules.allow_token_ids and NUMBERS.search(rest):
            raise bad(HINT_TOKEN_IDS, "token_ids")
        raise bad(f"the request has {values} values; it may have {rules.max_batch} texts (--max-client-batch)", "batch")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`. Python's parser would keep the last of two fields of one name, and lose the texts of the other."""
    value: dict[str, Any] = {}
    for name, part in pairs:
        if name in value:
            raise bad(f"the request has {quoted(name)} twice", "field", None)
        value[name] = part
    return value


def check_names(content: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse a field whose name is nearly one that is `known`; others that are unknown are ignored, as other servers do.

    Raises:
        Refused: 400.
    """
    for name, value in content.items():
        if value is None or name in known:
            continue
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=NEAR) if len(name) <= MAX_NAME else []
        if near:
            raise bad(f"{quoted(name)} is no field of a request; did you mean {near[0]}?", "field", name)


def check_strings(content: dict[str, Any], rules: Rules, names: Sequence[str]) -> None:
    """Refuse fields called `names` that are no strings, or too long.

    Raises:
        Refused: 400; 404 for a model's name that is too long to be one.
    """
    for name in names:
        value = content.get(name)
        if value is not None and not isinstance(value, str):
            raise bad(f"{name} is not a string", "type", name)
        if value is not None and len(value) > (rules.max_body if name == "instruction" else LONGEST_NAME):
            if name == "model":
                raise Refused(404, f"the model {quoted(value)} does not exist; see /v1/models", "model", "model")
            raise bad(f"{name} has {len(value)} characters; it may have {LONGEST_NAME}", "type", name)
        if value is not None and has_surrogate(value):
            raise bad(f"{name} holds half of a surrogate pair", "surrogate", name)


def _check_types(content: dict[str, Any], rules: Rules) -> None:
    check_strings(content, rules, ("model", "user", *prompts.FIELDS))
    if (encoding := content.get("encoding_format")) is not None and encoding not in ENCODINGS:
        raise bad(f"encoding_format is {quoted(encoding)}; it must be {' or '.join(ENCODINGS)}", "type", "encoding_format")
    size = whole(content.get("dimensions"))
    if size is not None and (not is_integer(size) or not rules.allows(size)):
        raise bad(
            f"dimensions is {quoted(size)}; this model gives {rules.sizes}",
            "dimensions",
            "dimensions",
        )
    special = content.get("add_special_tokens")
    if special is not None and not isinstance(special, bool):
        raise bad("add_special_tokens is neither true nor false", "type", "add_special_tokens")
    if content.get("messages") is not None:
        raise bad("messages are for chat; give the texts as input", "type", "messages")


def _inputs(value: Any, rules: Rules) -> Sequence[str | list[int]]:
    """The field `input` as a list of texts, or of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise bad("input is missing" if value is None else "input is neither a text nor a list of texts", "type")
    if not value:
        raise bad("input is an empty list", "empty")
    inputs = [value] if all(is_integer(item) for item in value) else value
    if len(inputs) > rules.max_batch:
        raise bad(f"input has {len(inputs)} texts; a request may have {rules.max_batch} (--max-client-batch)", "batch")
    kinds = [str if isinstance(item, str) else list if isinstance(item, list) else None for item in inputs]
    for index, kind in enumerate(kinds):
        if kind is None or kind is not kinds[0]:
            raise bad(f"input[{index}] is {'of another type than input[0]' if kind else 'not a text'}", "type")
    if kinds[0] is str:
        return inputs
    if any(isinstance(item, str) for item in inputs[0]):
        raise bad("input[0] is a list of texts; give all texts in one list", "type")
    if not rules.allow_token_ids:
        raise bad(HINT_TOKEN_IDS, "token_ids")
    for index, ids in enumerate(inputs):
        if not ids:
            raise bad(f"input[{index}] is empty", "empty")
        if not all(is_integer(token) for token in ids):
            raise bad(f"input[{index}] is neither a text nor a list of token ids", "type")
        if not all(0 <= token < rules.table_rows for token in ids):
            raise bad(f"input[{index}] has a token id beyond 0 to {rules.table_rows - 1}, those of this model", "type")
    return inputs


def _text(text: str, index: int, prompt: str, rules: Rules) -> str:
    """The text at `index` of the request as the model reads it, cleaned if the rules say so."""
    if has_surrogate(text):
        raise bad(f"input[{index}] holds half of a surrogate pair, which is not a character", "surrogate")
    entire = model_input(text, prompt, cleaned=rules.clean)
    if not entire[len(prompt) :].strip():
        detail = " after invisible characters are removed" if text.strip() else ""
        raise bad(f"input[{index}] is empty{detail}", "empty")
    return lower_cased(entire) if rules.lower_case else entire


def check_tokens(inputs: Sequence[str | list[int]], token_beyond: TokenBeyond) -> None:
    """Refuse a text with a token that has no row in the token table: the engine would end.

    Raises:
        Refused: 400, with the index of the text.
    """
    for index, text in enumerate(inputs):
        if isinstance(text, str) and (token := token_beyond(text)) is not None:
            raise bad(
                f"input[{index}] holds the token {quoted(token)}, which the tokenizer has and the model has not; take it out "
                "of the text",
                "token",
            )
