"""The document at /openapi.json: the routes that the gate lets through, and none of vLLM's others."""

from __future__ import annotations

import json
from typing import Any

from qembed.installation import version
from qembed.serve.gate import long_texts, prompt, rerank_openapi
from qembed.vllm.gate_rules import LONG_TEXTS, Rules

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
    "400": "The request is invalid; the message says why, and which text.",
    "401": "No key, or a wrong one.",
    "404": "No such model.",
    "405": "The method is not POST.",
    "408": "The request was not complete in time.",
    "413": "The request is too large.",
    "415": "The content type is not application/json, or the content encoding not gzip or deflate.",
    "421": "The Host header has no name of this server (--allowed-host).",
    "500": "A vector or score has NaN or infinity.",
    "503": "The server is busy, starting or stopping; Retry-After says when to retry.",
}


def document(rules: Rules) -> bytes:
    """The OpenAPI 3.1 document, as JSON."""
    secured: dict[str, Any] = {"security": [{"key": []}]} if rules.keys else {}
    unauthorized = {"401": _json(ERRORS["401"], ERROR)} if rules.keys else {}

    def get(summary: str, content: dict[str, Any], *errors: str) -> dict[str, Any]:
        documented = {code: _json(ERRORS[code], ERROR) for code in errors}
        return {"get": {"summary": summary, "responses": {"200": content, **documented, **unauthorized}, **secured}}

    def post(operation: dict[str, Any]) -> dict[str, Any]:
        documented = {code: _json(description, ERROR) for code, description in ERRORS.items()}
        return {
            "post": {
                "summary": operation["summary"],
                "requestBody": {"required": True, "content": {"application/json": {"schema": operation["request"]}}},
                "responses": {"200": _json(operation["description"], operation["answer"]), **documented},
                **secured,
            }
        }

    operations = _embeddings(rules) if rules.instruction is None else rerank_openapi.operations(rules)
    paths = {
        **{path: post(operation) for path, operation in operations.items()},
        "/v1/models": get(
            "The served model, and its names with a prompt." if rules.prompt_models else "The served model.",
            _json("Its names.", {"type": "object", "required": ["data"]}),
        ),
        "/v1/models/{model}": {
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            **get("A model by name.", _json("Its entry.", {"type": "object", "required": ["id"]}), "404"),
        },
        "/version": get(
            "Versions of vLLM and qembed, and the prompt for requests without one.",
            _json("They.", {"type": "object", "required": ["version", "qembed", "default_prompt"]}),
        ),
        "/metrics": get("Metrics for Prometheus.", {"description": "Text.", "content": {"text/plain": {}}}),
        "/openapi.json": get("This document.", _json("OpenAPI.", {"type": "object"})),
        "/health": {
            "get": {
                "summary": "Whether the server is healthy.",
                "responses": {"200": {"description": "It is."}, "503": {"description": "It is not."}},
            }
        },
    }
    content = {
        "openapi": "3.1.0",
        "info": {"title": "qembed", "version": version()},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if rules.keys else {},
    }
    return json.dumps(content).encode()


def _embeddings(rules: Rules) -> dict[str, dict[str, Any]]:
    operation = {
        "summary": "Embed texts, as in OpenAI's API.",
        "request": _request(rules),
        "answer": _ANSWER,
        "description": "One vector per text.",
    }
    return {"/v1/embeddings": operation}


def _request(rules: Rules) -> dict[str, Any]:
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
            "dimensions": _dimensions(rules),
            "user": {"type": ["string", "null"]},
            "prompt_name": {"enum": [*sorted(rules.prompts), "", None]},
            "instruction": {"type": ["string", "null"]},
            "input_type": {"enum": [*prompt.types(rules), None]},
            "task": {"enum": [*prompt.types(rules), None]},
            "truncate_prompt_tokens": {"type": ["integer", "null"], "minimum": -1, "maximum": rules.max_model_len},
            "truncate": {"enum": [True, False, *long_texts.TRUNCATES, None]},
            "truncation": {"enum": [True, False, *long_texts.TRUNCATES, None]},
            "long_texts": {"enum": [*LONG_TEXTS, None]},
            "add_special_tokens": {"type": ["boolean", "null"]},
        },
    }


def _dimensions(rules: Rules) -> dict[str, Any]:
    if rules.smallest is None:
        return {"enum": [*rules.dimensions, None]}
    return {"type": ["integer", "null"], "minimum": rules.smallest, "maximum": max(rules.dimensions)}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


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
                    "parts": {"type": "integer", "minimum": 2, "description": "Of a text that was embedded in parts."},
                    "embedding": {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
                },
            },
        },
        "usage": {"type": "object", "required": ["prompt_tokens", "total_tokens"]},
    },
}
