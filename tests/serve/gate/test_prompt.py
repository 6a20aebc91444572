"""Which prompt a request gets: by its fields, the model's name, or the server's default."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qembed.serve.gate import openapi, request
from qembed.serve.gate.errors import Refused
from qembed.text.prompts import DEFAULT_PROMPTS
from qembed.vllm.gate_rules import Rules, load

RULES = Rules(
    folder="",
    max_model_len=100,
    dimensions=[4],
    prompts={"query": "q: ", "document": "", "Clustering": "c: "},
    prompt_models={"m-query": "query", "m-document": "document", "m-Clustering": "Clustering"},
)
QUERIES = ["query", "search_query", "retrieval.query"]
DOCUMENTS = ["document", "passage", "search_document", "retrieval.passage"]


def text(rules: Rules = RULES, **body: Any) -> object:
    """The text "a" as the model reads it."""
    return request.read(json.dumps({"input": "a", **body}).encode(), rules, len).inputs[0]


def refused(rules: Rules = RULES, **body: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        text(rules, **body)
    assert caught.value.status == 400
    return caught.value


def test_the_models_name_chooses_the_prompt() -> None:
    assert text(model="m") == text() == "a"
    assert text(model="m-query") == "q: a"
    assert text(model="m-document") == "a"
    assert text(model="m-Clustering") == "c: a"
    assert text(model="other-query") == "a"  # vLLM answers 404
    assert text(load(RULES.dump()), model="m-query") == "q: a"


def test_vllm_gets_the_name_that_the_request_gives() -> None:
    batch = request.read(b'{"input": "a", "model": "m-query"}', RULES, len)
    assert batch.body["model"] == "m-query"


@pytest.mark.parametrize("field", ["input_type", "task"])
def test_the_types_of_other_services_choose_the_prompt(field: str) -> None:
    for value in QUERIES:
        assert text(**{field: value}) == "q: a"
    for value in DOCUMENTS:
        assert text(**{field: value}) == "a"
    assert text(**{field: "Clustering"}) == "c: a"
    assert text(**{field: None}) == "a"


@pytest.mark.parametrize("field", ["input_type", "task"])
@pytest.mark.parametrize("value", ["classification", "", "Query", "x" * 1000])
def test_an_unknown_type_is_refused_with_the_known_ones(field: str, value: str) -> None:
    error = refused(**{field: value})
    assert (error.param, error.reason) == (field, "prompt")
    for known in (*QUERIES, *DOCUMENTS, "Clustering"):
        assert known in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize("value", [5, ["query"], {"query": 1}, True, "\ud800", "x" * 1025])
def test_a_type_that_is_no_name_is_refused(value: object) -> None:
    assert refused(input_type=value).param == "input_type"


def test_a_field_overrides_the_name_and_the_name_the_default() -> None:
    rules = replace(RULES, default_prompt="query")
    assert text(rules) == text(rules, model="m") == "q: a"
    assert text(rules, model="m-document") == "a"
    assert text(rules, model="m-query", prompt_name="document") == "a"
    assert text(rules, model="m-query", prompt_name="") == "a"  # what qembed's own clients send: the text as it is
    assert text(rules, model="m-query", input_type="passage") == "a"
    assert text(rules, input_type="search_document") == "a"
    assert text(rules, model="m-document", input_type="query") == "q: a"
    assert text(rules, model="m-document", instruction="find") == "Instruct: find\nQuery:a"


@pytest.mark.parametrize("first", [{"prompt_name": ""}, {"prompt_name": "query"}, {"instruction": "find"}, {"task": "query"}])
def test_two_fields_for_the_prompt_are_refused(first: dict[str, str]) -> None:
    error = refused(**first, input_type="query")
    assert "either" in error.message
    assert all(name in error.message for name in (*first, "input_type"))


@pytest.mark.parametrize(
    ("own", "query", "document"),
    [
        ({"query": "query: ", "passage": "passage: "}, "query: a", "passage: a"),
        ({"search_query": "sq: ", "search_document": "sd: "}, "sq: a", "sd: a"),
        ({"search_query": "", "query": "q: ", "passage": "", "document": "d: "}, "q: a", "d: a"),
        ({}, DEFAULT_PROMPTS["query"] + "a", "a"),
    ],
)
def test_a_type_is_known_by_the_models_own_name_for_it(own: dict[str, str], query: str, document: str) -> None:
    models = {"m-query": "query", "m-document": "document"}
    rules = replace(RULES, prompts={**DEFAULT_PROMPTS, **own}, prompt_models=models)
    for value in QUERIES:
        assert text(rules, input_type=value) == query
    for value in DOCUMENTS:
        assert text(rules, input_type=value) == document
    assert (text(rules, model="m-query"), text(rules, model="m-document")) == (query, document)


def test_documents_get_the_models_default_prompt_unless_that_is_for_queries() -> None:
    rules = replace(RULES, prompts={**DEFAULT_PROMPTS, "all": "text: "})
    assert text(replace(rules, model_prompt="all"), input_type="document") == "text: a"
    assert text(replace(rules, model_prompt="query"), input_type="document") == "a"


@pytest.mark.parametrize(
    ("body", "param"),
    [({"model": "m-query"}, "model"), ({"input_type": "query"}, "input_type"), ({"prompt_name": "query"}, "prompt_name")],
)
def test_a_requested_prompt_before_token_ids_is_refused(body: dict[str, str], param: str) -> None:
    rules = replace(RULES, allow_token_ids=True)
    assert refused(rules, input=[1, 2], **body).param == param
    assert text(rules, input=[1, 2], model="m-document") == [1, 2]


@pytest.mark.parametrize("value", ["classification", 5])
def test_an_unknown_type_is_refused_when_the_name_has_a_prompt(value: object) -> None:
    assert refused(model="m-query", task=value).param == "task"


@pytest.mark.parametrize("field", ["input_type", "task"])
def test_a_type_that_occurs_twice_is_refused(field: str) -> None:
    with pytest.raises(Refused) as caught:
        request.read(f'{{"input": "a", "{field}": "query", "{field}": "document"}}'.encode(), RULES, len)
    assert (caught.value.status, caught.value.reason) == (400, "field")


@pytest.mark.parametrize(("wrong", "right"), [("inputType", "input_type"), ("input_typ", "input_type"), ("tasks", "task")])
def test_a_misspelt_type_is_refused(wrong: str, right: str) -> None:
    assert right in refused(**{wrong: "query"}).message


def test_the_openapi_document_lists_the_types() -> None:
    document = json.loads(openapi.document(RULES))
    schema = document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for field in ("input_type", "task"):
        assert {*QUERIES, *DOCUMENTS, "Clustering", None} <= set(schema["properties"][field]["enum"])
