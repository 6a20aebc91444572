"""The body of a request → texts as the model gets them, and what else vLLM has to know. Functions of data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qembed.serve.gate.errors import bad
from qembed.text.cleaning import clean, has_surrogate
from qembed.text.prompts import instruct
from qembed.vllm.gate_rules import Rules

ENCODINGS = ("float", "base64")
# Characters for each token of the limit that are looked at to tell how long a text is that is too long.
LOOK = 32
# Characters of the longest token, which is white space, with room to spare.
LONGEST_TOKEN = 256
PASSED_ON = ("model", "user", "dimensions")
LARGEST_ID = 2**31 - 1
HINT_TOKEN_IDS = (
    "input holds token ids, and nothing tells whose tokenizer made them; send texts (LangChain: "
    "OpenAIEmbeddings(check_embedding_ctx_length=False)), or start the server with --allow-token-ids if they are this model's"
)

Count = Callable[[str], int]


@dataclass(frozen=True)
class Batch:
    """A request that may pass.

    Attributes:
        inputs: a text, or the ids of one, for each vector of the answer.
        body: what vLLM is asked, as JSON.
        encoding: "float" or "base64", as the client wants the vectors.
    """

    inputs: Sequence[str | list[int]]
    body: dict[str, Any]
    encoding: str


def read(raw: bytes, rules: Rules, count: Count) -> Batch:
    """What the body `raw` asks for. `count` tells the tokens of a text, with those that the model appends.

    Raises:
        Refused: 400, it is wrong or more than the rules allow.
    """
    asked = parse(raw)
    _check_types(asked, rules)
    inputs = _inputs(asked.get("input"), rules)
    cut = _truncation(asked, rules)
    before = _prefix(asked, rules)
    if isinstance(inputs[0], str):
        inputs = [before + _text(str(text), index, rules) for index, text in enumerate(inputs)]
    elif before and (asked.get("prompt_name") or asked.get("instruction")):
        raise bad("a prompt cannot be put before token ids; send texts", "prompt", "prompt_name")
    if cut is not None:  # vLLM would turn all of it to tokens before it cuts
        inputs = [text[: LONGEST_TOKEN * cut] for text in inputs]
    else:
        for index, text in enumerate(inputs):
            _check_length(text, index, rules.max_model_len, count)
    body = {name: asked[name] for name in PASSED_ON if asked.get(name) is not None}
    body |= {"input": list(inputs), "encoding_format": "base64"}
    if cut is not None:
        body["truncate_prompt_tokens"] = cut
    if asked.get("add_special_tokens") is not None:
        body["add_special_tokens"] = asked["add_special_tokens"]
    return Batch(inputs, body, asked.get("encoding_format") or "float")


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        Refused: 400, it is none.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad(f"the request is not UTF-8: byte {error.start} cannot be read", "json", None) from error
    except RecursionError as error:
        raise bad("the request is nested too deeply", "json", None) from error
    except ValueError as error:
        raise bad(f"the request is not JSON: {error}", "json", None) from error
    if not isinstance(value, dict):
        raise bad("the request is not a JSON object", "json", None)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_types(asked: dict[str, Any], rules: Rules) -> None:
    for name in ("model", "user", "prompt_name", "instruction"):
        value = asked.get(name)
        if value is not None and not isinstance(value, str):
            raise bad(f"{name} is no text", "type", name)
        if value is not None and has_surrogate(value):
            raise bad(f"{name} holds half of a surrogate pair", "surrogate", name)
    if (encoding := asked.get("encoding_format")) is not None and encoding not in ENCODINGS:
        raise bad(
            f"encoding_format is {_shown(encoding)}; this server gives {' and '.join(ENCODINGS)}", "type", "encoding_format"
        )
    size = asked.get("dimensions")
    if size is not None and (not _is_whole(size) or size not in rules.dimensions):
        raise bad(
            f"dimensions is {_shown(size)}; this model gives {', '.join(map(str, rules.dimensions))}",
            "dimensions",
            "dimensions",
        )
    special = asked.get("add_special_tokens")
    if special is not None and not isinstance(special, bool):
        raise bad("add_special_tokens is neither true nor false", "type", "add_special_tokens")
    if asked.get("messages") is not None:
        raise bad("messages are for chat; give the texts as input", "type", "messages")


def _inputs(given: Any, rules: Rules) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise bad("input is missing" if given is None else "input is neither a text nor a list of texts", "type")
    if not given:
        raise bad("input is an empty list", "empty")
    if all(_is_whole(item) for item in given):
        given = [given]
    if len(given) > rules.max_batch:
        raise bad(f"input has {len(given)} texts; a request may have {rules.max_batch} (--max-client-batch)", "batch")
    kinds = [str if isinstance(item, str) else list if isinstance(item, list) else None for item in given]
    for index, kind in enumerate(kinds):
        if kind is None or kind is not kinds[0]:
            raise bad(f"input[{index}] is {'not like input[0]' if kind else 'no text'}", "type")
    if kinds[0] is str:
        return given
    if not rules.allow_token_ids:
        raise bad(HINT_TOKEN_IDS, "token_ids")
    for index, ids in enumerate(given):
        if not ids:
            raise bad(f"input[{index}] is empty", "empty")
        if not all(_is_whole(one) and 0 <= one <= LARGEST_ID for one in ids):
            raise bad(f"input[{index}] is neither a text nor a list of token ids", "type")
    return given


def _text(text: str, index: int, rules: Rules) -> str:
    if has_surrogate(text):
        raise bad(f"input[{index}] holds half of a surrogate pair, which is no character", "surrogate")
    cleaned = clean(text) if rules.clean else text
    if not cleaned.strip():
        why = "" if not text.strip() else " once characters that cannot be seen are taken out"
        raise bad(f"input[{index}] is empty{why}", "empty")
    return cleaned


def _prefix(asked: dict[str, Any], rules: Rules) -> str:
    name, instruction = asked.get("prompt_name"), asked.get("instruction")
    if instruction is not None:
        if name is not None:
            raise bad("give either prompt_name or instruction", "prompt", "instruction")
        task = clean(instruction) if rules.clean else instruction
        if not task.strip():
            raise bad("instruction is empty", "prompt", "instruction")
        return instruct(task)
    if name is None:
        name = rules.default_prompt
    if name is None:
        return ""
    if name not in rules.prompts:
        raise bad(f"prompt_name is {_shown(name)}; this model has {', '.join(sorted(rules.prompts))}", "prompt", "prompt_name")
    return rules.prompts[name]


def _truncation(asked: dict[str, Any], rules: Rules) -> int | None:
    """Tokens to keep, or None if a text that is too long is to be refused."""
    if asked.get("truncation_side") not in (None, "right"):
        raise bad("truncation_side: only the end of a text can be cut", "truncation", "truncation_side")
    cut = asked.get("truncate_prompt_tokens")
    if cut is None:
        return rules.max_model_len if rules.truncate else None
    if not _is_whole(cut) or not (cut == -1 or 1 <= cut <= rules.max_model_len):
        raise bad(
            f"truncate_prompt_tokens is {_shown(cut)}; give 1 to {rules.max_model_len}, or -1 for {rules.max_model_len}",
            "truncation",
            "truncate_prompt_tokens",
        )
    return rules.max_model_len if cut == -1 else cut


def _check_length(text: str | list[int], index: int, limit: int, count: Count) -> None:
    """A text of fewer bytes than the limit is not tokenized for this: each byte is one token at most."""
    if isinstance(text, list):
        tokens, more = len(text), ""
    elif len(text) * 4 < limit or len(text.encode()) < limit:
        return
    else:
        looked = text[: LOOK * limit]
        tokens, more = count(looked), "" if len(looked) == len(text) else "more than "
    if tokens > limit:
        raise bad(
            f"input[{index}] has {more}{tokens} tokens; the limit is {limit}. Shorten it, or have it cut with "
            f"truncate_prompt_tokens (or --truncate)",
            "length",
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    try:
        said = json.dumps(value, ensure_ascii=True)
    except (ValueError, RecursionError):
        return "something else"
    return said if len(said) <= 60 else said[:60] + "…"
