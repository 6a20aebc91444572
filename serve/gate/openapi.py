"""What the server says of itself at /openapi.json: the routes that are open, and nothing of vLLM's others."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

from qembed.vllm.gate_rules import Rules

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}
ERRORS = {
    "400": "The request is wrong: the message says what, and which of the texts.",
    "401": "No key, or a wrong one.",
    "404": "No such model.",
    "405": "Another method than POST.",
    "408": "The request did not come whole in time.",
    "413": "The request is too large.",
    "415": "Not application/json.",
    "500": "A vector was not finite.",
    "503": "Busy, or being started or stopped; Retry-After says when to come again.",
}


def document(rules: Rules) -> bytes:
    """The OpenAPI 3.1 document, as JSON."""
    secured: dict[str, Any] = {"security": [{"key": []}]} if rules.keys else {}
    embeddings = {
        "summary": "Vectors of texts, as OpenAI's API has it.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _asked(rules)}}},
        "responses": {
            "200": _json("A vector for each text.", _ANSWER),
            **{code: _json(said, ERROR) for code, said in ERRORS.items()},
        },
        **secured,
    }
    unauthorized = {"401": _json(ERRORS["401"], ERROR)} if rules.keys else {}

    def read(summary: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": content, **unauthorized}, **secured}}

    paths = {
        "/v1/embeddings": {"post": embeddings},
        "/v1/models": read("The model that is served.", _json("Its name.", {"type": "object", "required": ["data"]})),
        "/version": read("vLLM's version.", _json("Its version.", {"type": "object", "required": ["version"]})),
        "/metrics": read("Numbers for Prometheus.", {"description": "Text.", "content": {"text/plain": {}}}),
        "/openapi.json": read("This document.", _json("OpenAPI.", {"type": "object"})),
        "/health": {
            "get": {
                "summary": "Whether it answers.",
                "responses": {"200": {"description": "It does."}, "503": {"description": "It does not."}},
            }
        },
    }
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "qembed", "version": metadata.version("qembed")},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if rules.keys else {},
    }
    return json.dumps(whole).encode()


def _asked(rules: Rules) -> dict[str, Any]:
    text: dict[str, Any] = {"type": "string", "minLength": 1}
    ids: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    forms = [text, {"type": "array", "items": text, "minItems": 1, "maxItems": rules.max_batch}]
    if rules.allow_token_ids:
        forms += [ids, {"type": "array", "items": ids, "minItems": 1, "maxItems": rules.max_batch}]
    return {
        "type": "object",
        "required": ["input"],
        "properties": {
            "input": {"oneOf": forms},
            "model": {"type": ["string", "null"]},
            "encoding_format": {"enum": ["float", "base64", None]},
            "dimensions": {"enum": [*rules.dimensions, None]},
            "user": {"type": ["string", "null"]},
            "prompt_name": {"enum": [*sorted(rules.prompts), None]},
            "instruction": {"type": ["string", "null"]},
            "truncate_prompt_tokens": {"type": ["integer", "null"], "minimum": -1, "maximum": rules.max_model_len},
            "add_special_tokens": {"type": ["boolean", "null"]},
        },
    }


def _json(said: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": said, "content": {"application/json": {"schema": schema}}}


_ANSWER = {
    "type": "object",
    "required": ["object", "model", "data", "usage"],
    "properties": {
        "object": {"const": "list"},
        "model": {"type": "string"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["object", "index", "embedding"],
                "properties": {
                    "object": {"const": "embedding"},
                    "index": {"type": "integer"},
                    "embedding": {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
                },
            },
        },
        "usage": {"type": "object", "required": ["prompt_tokens", "total_tokens"]},
    },
}
