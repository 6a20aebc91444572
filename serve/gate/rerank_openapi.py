"""A reranker's routes in the document at /openapi.json."""

from __future__ import annotations

from typing import Any

from qembed.serve.gate.rerank_request import RERANK, SCORE
from qembed.vllm.gate_rules import Rules

USAGE = {"type": "object", "required": ["prompt_tokens", "total_tokens"]}


def operations(rules: Rules) -> dict[str, dict[str, Any]]:
    """Summary, request, answer and its description of each route."""
    text: dict[str, Any] = {"type": "string", "minLength": 1}
    document = {"oneOf": [text, {"type": "object", "required": ["text"], "properties": {"text": text}}]}
    documents = {"oneOf": [document, {"type": "array", "items": document, "minItems": 1, "maxItems": rules.max_batch}]}
    common = {
        "model": {"type": ["string", "null"]},
        "user": {"type": ["string", "null"]},
        "instruction": {"type": ["string", "null"], "default": rules.instruction},
        "max_tokens_per_doc": {"type": ["integer", "null"], "minimum": 1},
    }
    ranked = _object(
        ["query", "documents"],
        query=document,
        documents=documents,
        top_n={"type": ["integer", "null"], "minimum": 0},
        return_documents={"type": ["boolean", "null"], "default": True},
        **common,
    )
    result = _object(
        ["index", "relevance_score"],
        index={"type": "integer"},
        relevance_score={"type": "number", "minimum": 0, "maximum": 1},
        document=_object(["text"], text={"type": "string"}),
    )
    results = _object(
        ["id", "model", "usage", "results"],
        id={"type": "string"},
        model={"type": "string"},
        usage=USAGE,
        results={"type": "array", "items": result},
    )
    scored = _object(["text_1", "text_2"], text_1=documents, text_2=documents, **common)
    score = _object(
        ["index", "object", "score"], index={"type": "integer"}, object={"const": "score"}, score={"type": "number"}
    )
    scores = _object(
        ["object", "model", "usage", "data"],
        object={"const": "list"},
        model={"type": "string"},
        usage=USAGE,
        data={"type": "array", "items": score},
    )
    ranking = {
        "summary": "Rank documents by their relevance to a query, as in Cohere's and Jina's API.",
        "request": ranked,
        "answer": results,
        "description": "Results from the most relevant document down.",
    }
    scoring = {
        "summary": "Score each pair of two texts, as in vLLM's API.",
        "request": scored,
        "answer": scores,
        "description": "A score for each pair.",
    }
    return {**dict.fromkeys(RERANK, ranking), SCORE: scoring}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}
