"""Texts beyond the model's limit: refused, cut, or embedded in parts. Pure functions.

The vector of a text in parts is the mean of its parts' vectors, weighted by their tokens. Parts overlap, and end where
sentences do (`qembed.text.chunking`). Each is behind the text's prompt.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

from qembed.serve.gate.errors import bad, quoted
from qembed.serve.gate.json_numbers import is_integer, whole
from qembed.text.chunking import chunks
from qembed.text.cleaning import lower_cased
from qembed.vllm.gate_rules import LONG_TEXTS, Rules

TRUNCATES = {"END": True, "NONE": False}
"""Values of `truncate` and `truncation` besides true and false (Cohere's and NIM's)."""
COUNTED_CHARACTERS = 32
"""Characters per token of the limit that are tokenized to check a text's length."""
OVERLAP = 8
"""Adjacent parts share up to one of so many of their tokens."""
LEAST = 16
"""Tokens of a text that a part must have room for beside the prompt."""

Count = Callable[[str], int]


def handling(content: dict[str, Any], rules: Rules) -> tuple[int | None, bool]:
    """What becomes of texts that are too long: the tokens to cut them to (None: they are not cut), and whether parts are made.

    Without either they are refused.

    Raises:
        Refused: 400, a field is invalid, or contradicts another.
    """
    if content.get("truncation_side") not in (None, "right"):
        raise bad("truncation_side: only the end of a text can be cut", "truncation", "truncation_side")
    fields = [name for name in ("truncate", "truncation", "long_texts") if content.get(name) is not None]
    if len(fields) > 1:
        raise bad(f"give either {' or '.join(fields)}", "truncation", fields[-1])
    way = rules.long_texts
    for name in fields:
        way = _way(content[name], name)
    tokens = whole(content.get("truncate_prompt_tokens"))
    if tokens is None:
        return rules.max_model_len if way == "truncate" else None, way == "chunk"
    if "long_texts" in fields and way != "truncate":
        raise bad(f"long_texts is {way}; then nothing is truncated to truncate_prompt_tokens", "truncation", "long_texts")
    if not is_integer(tokens) or not (tokens == -1 or 1 <= tokens <= rules.max_model_len):
        raise bad(
            f"truncate_prompt_tokens is {quoted(tokens)}; give 1 to {rules.max_model_len}, or -1 for {rules.max_model_len}",
            "truncation",
            "truncate_prompt_tokens",
        )
    return rules.max_model_len if tokens == -1 else tokens, False


def _way(value: Any, name: str) -> str:
    """One of LONG_TEXTS by the `value` of the field `name`: long_texts, or another service's (NIM's, Jina's, Voyage's)."""
    if name == "long_texts":
        if value not in LONG_TEXTS:
            raise bad(f"long_texts is {quoted(value)}; give {', '.join(LONG_TEXTS)}", "truncation", name)
        return str(value)
    truncates = TRUNCATES.get(value, value) if isinstance(value, str) else value
    if not isinstance(truncates, bool):
        raise bad(f"{name} is {quoted(value)}; give true or END, false or NONE", "truncation", name)
    return "truncate" if truncates else "refuse"


def in_parts(
    texts: Sequence[str], prompt: str, rules: Rules, count: Count
) -> tuple[Sequence[str | list[int]], Sequence[Sequence[int]]]:
    """`texts`, which have the `prompt`, with those that are too long in parts; and the tokens of each part, by text.

    The second is empty if none is too long.

    Raises:
        Refused: 400, there are too many parts, or a prompt leaves too little room.
    """
    prompt = lower_cased(prompt) if rules.lower_case else prompt
    limit = rules.max_model_len
    inputs = [
        [text] if _tokens(text, limit, count) is None else _parts(text[len(prompt) :], prompt, limit, count) for text in texts
    ]
    if (parts := sum(map(len, inputs))) > rules.max_batch:
        raise bad(f"input has {parts} parts; a request may have {rules.max_batch} (--max-client-batch)", "batch")
    if parts == len(texts):
        return texts, ()
    flat: list[str | list[int]] = [part for of_text in inputs for part in of_text]
    return flat, [list(map(count, of_text)) if len(of_text) > 1 else [1] for of_text in inputs]


def check_length(text: str | list[int], index: int, limit: int, count: Count) -> None:
    """Refuse a text of more than `limit` tokens.

    Raises:
        Refused: 400.
    """
    if (tokens := _tokens(text, limit, count)) is not None:
        raise bad(
            f"input[{index}] has {tokens} tokens; the limit is {limit}. Shorten it, truncate it with truncate_prompt_tokens "
            '(or --truncate), or have it embedded in parts with "long_texts": "chunk" (or --long-texts chunk)',
            "length",
        )


def _tokens(text: str | list[int], limit: int, count: Count) -> str | None:
    """How many tokens a text has, if these are more than `limit`; otherwise None.

    A text of fewer bytes is not tokenized: each byte is at most one token.
    """
    if isinstance(text, list):
        return str(len(text)) if len(text) > limit else None
    if len(text) * 4 < limit or len(text.encode()) < limit:
        return None
    start = text[: COUNTED_CHARACTERS * limit]
    tokens = count(start)
    if tokens <= limit:
        return None
    return str(tokens) if len(start) == len(text) else f"more than {tokens}"


def _parts(text: str, prompt: str, limit: int, count: Count) -> list[str]:
    """`text` in parts, each behind `prompt` and of at most `limit` tokens by `count`, appended ones included."""
    size = limit - (count(prompt) - count(""))
    while size >= LEAST:
        spans = chunks(text, size, size // OVERLAP, lambda texts: list(map(count, texts)))
        inputs = [prompt + text[span.start : span.end] for span in spans]
        # A prompt and a part can have more tokens together than apart.
        excess = max(map(count, inputs)) - limit
        if excess <= 0:
            return inputs
        size -= excess
    raise bad(f"the prompt leaves no room for a text within the limit of {limit} tokens", "length")


def merged(answer: dict[str, Any], tokens: Sequence[Sequence[int]], *, normalized: bool) -> dict[str, Any]:
    """vLLM's `answer` for the parts of texts, as one for the texts.

    Args:
        answer: with a float32 vector in base64 for each part.
        tokens: the tokens of each part, by text.
        normalized: whether vectors have unit length.

    Returns:
        The answer with a vector for each text. The entry of a text of several parts has their number as "parts".
    """
    import numpy as np

    rows = []
    items = iter(answer["data"])
    for index, counts in enumerate(tokens):
        row, *others = (next(items) for _ in counts)
        if others:
            vectors = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), np.float32) for item in (row, *others)])
            mean = np.average(vectors, axis=0, weights=counts)
            if normalized:
                mean /= max(float(np.linalg.norm(mean)), np.finfo(np.float32).tiny)
            row = {**row, "embedding": base64.b64encode(mean.astype(np.float32).tobytes()).decode(), "parts": len(counts)}
        rows.append({**row, "index": index})
    return {**answer, "data": rows}
