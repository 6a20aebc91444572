"""Fields of other services' APIs that would change vectors or scores, and that the gate refuses rather than ignores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qembed.serve.gate.errors import bad, quoted
from qembed.vllm.gate_rules import Rules

Unsupported = Mapping[str, tuple[tuple[Any, ...], str]]
"""By a field's name: values that ask for what the server does anyway, and what to do instead of others."""

CUT = "a document that is too long is cut; max_tokens_per_doc cuts it at fewer tokens"
FLOAT = ("float", "float32", ["float"])


def of_embeddings(rules: Rules) -> Unsupported:
    """The fields of requests for vectors: sentence-transformers', Jina's, TEI's, Voyage's, Cohere's, vLLM's and DashScope's."""
    length = "all vectors of this server have unit length" if rules.normalized else "start the server with --normalize"
    dtype = "vectors are float32; encoding_format is float or base64"
    return {
        "prompt": ((), "give instruction, or prompt_name, or put the prompt into the texts"),
        "text_type": ((), "give input_type"),
        **dict.fromkeys(("normalize", "normalized", "normalize_embeddings", "use_activation"), ((rules.normalized,), length)),
        "output_dimension": ((), "give dimensions"),
        **dict.fromkeys(("output_dtype", "embedding_type", "embedding_types", "embed_dtype"), (FLOAT, dtype)),
        "endianness": (("native", "little"), "numbers are little-endian"),
        "late_chunking": ((False,), "each text has a vector of its own"),
    }


OF_SCORES: Unsupported = {
    "rank_fields": ((), "a document is a text, or an object with the field text; put what is to be read into it"),
    "texts": ((), "give the texts as documents"),
    "top_k": ((), "give top_n"),
    **dict.fromkeys(
        ("prompt", "prompt_name", "task", "input_type"), (("",), "give instruction; the rest of the template is the model's")
    ),
    **dict.fromkeys(("truncate", "truncation"), ((True, "END"), CUT)),
    "truncate_prompt_tokens": ((-1,), CUT),
    "raw_scores": ((False,), "scores are 0 to 1"),
    **dict.fromkeys(("use_activation", "normalize"), ((True,), "scores are 0 to 1")),
}
"""The fields of requests for scores: Cohere's, Jina's, NIM's, sentence-transformers', TEI's, vLLM's and Voyage's."""


def check_supported(content: Mapping[str, Any], unsupported: Unsupported) -> None:
    """Refuse a request that asks for something `unsupported`.

    Raises:
        Refused: 400, with what to do instead.
    """
    for name, (same, advice) in unsupported.items():
        value = content.get(name)
        if value is not None and value not in same:
            given = f"{name} {quoted(value)}" if same else name
            raise bad(f"{given} is not supported: {advice}", "field", name)
