"""The prompt that a request asks for: by a field, else by the model's name, else the server's default."""

from __future__ import annotations

from typing import Any

from qembed.serve.gate.errors import bad, quoted
from qembed.text.cleaning import clean
from qembed.text.prompts import instruct
from qembed.vllm.gate_rules import Rules

QUERY = ("search_query", "retrieval.query", "query")
DOCUMENT = ("search_document", "retrieval.passage", "passage", "corpus", "document")
"""Values of `input_type` and `task` with one meaning (Cohere's, Jina's, NIM's, Voyage's), and names of a model's prompts.

"query" and "document" come last: every checkpoint has prompts of these names, though the model may know them by others.
"""
FIELDS = ("prompt_name", "instruction", "input_type", "task")


def chosen(content: dict[str, Any], rules: Rules) -> tuple[str, str | None]:
    """The prompt to put before each text (empty: none), and the field that asks for it (None: the server's default does).

    Raises:
        Refused: 400, two fields ask for a prompt, or the model has none of that name.
    """
    fields = [name for name in FIELDS if content.get(name) is not None]
    if len(fields) > 1:
        raise bad(f"give either {' or '.join(fields)}", "prompt", fields[-1])
    if not fields:
        if (name := rules.prompt_models.get(content.get("model") or "")) is not None:
            return typed(name, rules) or "", "model"
        return rules.prompts[rules.default_prompt] if rules.default_prompt else "", None
    field = fields[0]
    value = content[field]
    if field == "instruction":
        task = clean(value) if rules.clean else value
        if not task.strip():
            raise bad("instruction is empty", "prompt", "instruction")
        return instruct(task), field
    if field == "prompt_name":
        known, prompt = sorted(rules.prompts), rules.prompts.get(value) if value else ""
    else:
        known, prompt = types(rules), typed(value, rules)
    if prompt is None:
        raise bad(f"{field} is {quoted(value)}; this model has {', '.join(known)}", "prompt", field)
    return prompt, field


def types(rules: Rules) -> list[str]:
    """The values that `input_type` and `task` may have."""
    return sorted({*QUERY, *DOCUMENT, *rules.prompts})


def typed(value: str, rules: Rules) -> str | None:
    """The prompt for texts of the type `value`; empty: none; None: there is no such type."""
    if value in QUERY:
        return _first(QUERY, rules)
    if value in DOCUMENT:
        return _first(DOCUMENT, rules) or (rules.prompts.get(rules.model_prompt or "", "") if _is_for_all(rules) else "")
    return rules.prompts.get(value)


def _first(names: tuple[str, ...], rules: Rules) -> str:
    return next((rules.prompts[name] for name in names if rules.prompts.get(name)), "")


def _is_for_all(rules: Rules) -> bool:
    """Whether the model's own prompt for texts without another is not one for queries."""
    return rules.model_prompt not in QUERY
