"""Valid requests, and the errors of invalid ones."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qembed.serve.gate.errors import Refused
from qembed.serve.gate.request import Batch, read
from qembed.vllm.gate_rules import Rules, load

CASES = Path(__file__).parents[2] / "cases"
QUERY = "Instruct: search\nQuery:"
RULES = Rules(
    folder="", max_model_len=10, dimensions=[32, 64], prompts={"query": QUERY, "document": ""}, max_batch=3, max_body=10_000
)


def words(text: str) -> int:
    return len(text.split())


def ask(rules: Rules = RULES, **body: Any) -> Batch:
    return read(json.dumps(body).encode(), rules, words)


def refused(raw: bytes | None = None, rules: Rules = RULES, **body: Any) -> str:
    with pytest.raises(Refused) as caught:
        read(raw if raw is not None else json.dumps(body).encode(), rules, words)
    assert caught.value.status == 400
    error = json.loads(caught.value.body())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_rules_survive_serialization_in_one_line() -> None:
    line = RULES.dump()
    assert line.count(b"\n") == 1
    assert load(line) == RULES


def test_a_text_and_a_list_of_texts() -> None:
    assert ask(input="one").inputs == ["one"]
    assert ask(input=["one", "two"]).inputs == ["one", "two"]


@pytest.mark.parametrize("raw", [b'{"input": "a", "input": "b"}', b'{"input": "a", "x": {"y": 1, "z": 2, "y": 1}}'])
def test_a_field_that_occurs_twice_is_refused(raw: bytes) -> None:
    assert "twice" in refused(raw)


def test_requests_to_vllm_always_ask_for_base64() -> None:
    for encoding, expected in ((None, "float"), ("float", "float"), ("base64", "base64")):
        batch = ask(input="x", encoding_format=encoding, model="m", dimensions=32, unknown=1)
        assert batch.encoding == expected
        assert batch.body == {"input": ["x"], "encoding_format": "base64", "model": "m", "dimensions": 32}


def test_texts_are_lower_cased_with_their_prompt_if_the_model_reads_them_so() -> None:
    rules = replace(RULES, lower_case=True)
    assert ask(rules, input=["The CAT", "ΟΔΟΣ"], instruction="FIND").inputs[0].islower()
    assert ask(rules, input="ΟΔΟΣ").inputs == ["οδοσ"]  # as the tokenizers library: no final sigma
    assert ask(input="The CAT").inputs == ["The CAT"]


def test_texts_are_cleaned_unless_switched_off() -> None:
    assert ask(input="a\u200bb").inputs == ["ab"]
    assert ask(replace(RULES, clean=False), input="a\u200bb").inputs == ["a\u200bb"]


@pytest.mark.parametrize("empty", ["", " \n\t", "\u200b", "\x00\x01", "\u2003"])
def test_an_empty_text_is_refused_with_its_index(empty: str) -> None:
    assert refused(input=["full", empty]).startswith("input[1] is empty")


def test_without_cleaning_white_space_is_empty_and_invisible_characters_are_not() -> None:
    rules = replace(RULES, clean=False)
    assert refused(rules=rules, input=["full", "  "]).startswith("input[1] is empty")
    assert ask(rules, input="\u200b").inputs == ["\u200b"]


def test_a_text_that_is_too_long_is_refused_with_both_numbers() -> None:
    message = refused(input=["short", "w " * 12])
    assert message.startswith("input[1] has 12 tokens; the limit is 10.")
    assert "truncate_prompt_tokens" in message
    assert ask(input="w " * 10).inputs == ["w " * 10]


def test_a_prompts_tokens_count() -> None:
    assert "input[0] has 12 tokens" in refused(input="w " * 10, prompt_name="query")


def test_of_a_very_long_text_only_the_beginning_is_tokenized() -> None:
    lengths: list[int] = []

    def count(text: str) -> int:
        lengths.append(len(text))
        return words(text)

    with pytest.raises(Refused, match="more than 160 tokens; the limit is 10"):
        read(json.dumps({"input": "w " * 100_000}).encode(), RULES, count)
    assert lengths == [320]


def test_truncation_is_set_by_the_request_or_else_by_the_server() -> None:
    long = "w " * 50
    assert ask(input=long, truncate_prompt_tokens=-1).body["truncate_prompt_tokens"] == 10
    assert ask(input=long, truncate_prompt_tokens=4).body["truncate_prompt_tokens"] == 4
    assert ask(replace(RULES, long_texts="truncate"), input=long).body["truncate_prompt_tokens"] == 10
    assert "truncate_prompt_tokens" not in ask(input="short").body
    for wrong in (0, -2, 11, "4", 4.5, True, []):
        assert "truncate_prompt_tokens" in refused(input=long, truncate_prompt_tokens=wrong)
    assert "only the end" in refused(input=long, truncation_side="left")


def test_a_text_to_truncate_is_shortened_before_vllm_tokenizes_it() -> None:
    text = ask(input="w" * 9000, truncate_prompt_tokens=2).inputs[0]
    assert 512 <= len(text) < 1000


def test_prompts_are_prepended() -> None:
    assert ask(input=["a", "b"], prompt_name="query").inputs == [QUERY + "a", QUERY + "b"]
    assert ask(input="a", prompt_name="document").inputs == ["a"]
    assert ask(input="a", instruction="find\u200b it").inputs == ["Instruct: find it\nQuery:a"]
    default = replace(RULES, default_prompt="query")
    assert ask(default, input="a").inputs == [QUERY + "a"]
    assert ask(default, input="a", prompt_name="document").inputs == ["a"]
    assert refused(input="a", prompt_name="nope") == 'prompt_name is "nope"; this model has document, query'
    assert "either" in refused(input="a", prompt_name="query", instruction="find it")
    assert "instruction is empty" in refused(input="a", instruction=" ")


def test_token_ids_are_refused_unless_allowed() -> None:
    for ids in ([1, 2], [[1, 2], [3]]):
        message = refused(input=ids)
        assert "check_embedding_ctx_length=False" in message
        assert "--allow-token-ids" in message
        rules = replace(RULES, allow_token_ids=True, table_rows=100)
        assert ask(rules, input=ids).inputs == (ids if isinstance(ids[0], list) else [ids])
    assert "input[0] has 11 tokens" in refused(rules=rules, input=[list(range(11))])
    for wrong in ([[1], []], [[1, -1]], [[1, True]], [[1, 2.0]], [[2**40]], [[100]], [["a"]], [1, "a"], [[1], "a"]):
        assert "input" in refused(rules=rules, input=wrong)


@pytest.mark.parametrize("value", [33, 0, -1, 32.5, 33.0, "32", True, [32], 10**400, None])
def test_dimensions_must_be_among_the_models(value: object) -> None:
    if value is None:
        assert "dimensions" not in ask(input="a", dimensions=None).body
        return
    assert "this model gives 32, 64" in refused(input="a", dimensions=value)


def test_numbers_may_have_a_decimal_point() -> None:
    batch = ask(input="a", dimensions=32.0, truncate_prompt_tokens=4.0)
    assert (batch.body["dimensions"], batch.body["truncate_prompt_tokens"]) == (32, 4)
    assert isinstance(batch.body["dimensions"], int)


def test_lists_of_texts_are_not_called_token_ids() -> None:
    for rules in (RULES, replace(RULES, allow_token_ids=True)):
        message = refused(rules=rules, input=[["a", "b"]])
        assert "token" not in message
        assert "list of texts" in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("dimension", "dimensions"),
        ("encoding_fromat", "encoding_format"),
        ("encodingFormat", "encoding_format"),
        ("inputs", "input"),
        ("Dimensions", "dimensions"),
        ("promptName", "prompt_name"),
        ("instructions", "instruction"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_right_name(wrong: str, right: str) -> None:
    message = refused(input="a", **{wrong: "x"})
    assert wrong in message
    assert right in message
    assert ask(input="a", **{wrong: None}).inputs == ["a"]


def test_a_long_name_of_a_field_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison takes time in the square of the length."""
    monkeypatch.setattr("difflib.get_close_matches", lambda *_, **__: pytest.fail("compared"))
    assert ask(input="a", **{"x" * 100_000: 1}).inputs == ["a"]


def test_other_unknown_fields_are_ignored() -> None:
    others = {"extra_body": {}, "normalize": True, "priority": 1, "timeout": 5, "x" * 100_000: 1}
    assert set(ask(input="a", **others).body) == {"input", "encoding_format"}


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", ["normalize", "normalized", "normalize_embeddings", "use_activation"])
def test_another_length_of_vectors_than_the_servers_is_refused(name: str, normalized: bool) -> None:
    rules = replace(RULES, normalized=normalized)
    assert ask(rules, input="a", **{name: normalized}).inputs == ["a"]
    assert name in refused(rules=rules, input="a", **{name: not normalized})
    assert ask(rules, input="a", **{name: None}).inputs == ["a"]


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("prompt", "query: ", "instruction"),
        ("prompt", "", "instruction"),
        ("text_type", "query", "input_type"),
        ("output_dimension", 32, "dimensions"),
        ("output_dtype", "int8", "encoding_format"),
        ("embedding_types", ["float", "binary"], "encoding_format"),
        ("embed_dtype", "float16", "encoding_format"),
        ("endianness", "big", "little"),
        ("late_chunking", True, "own"),
        ("normalize", "no", "unit length"),
        ("normalize", {"p": [2]}, "unit length"),
    ],
)
def test_a_field_of_another_service_that_would_change_vectors_is_refused(field: str, value: object, advice: str) -> None:
    message = refused(input="a", **{field: value})
    assert field in message
    assert advice in message


@pytest.mark.parametrize(
    "fields",
    [
        {"output_dtype": "float", "embed_dtype": "float32", "embedding_type": "float", "embedding_types": ["float"]},
        {"late_chunking": False, "endianness": "little", "normalized": True},
    ],
)
def test_a_field_that_asks_for_what_the_server_does_passes(fields: dict[str, object]) -> None:
    assert set(ask(input="a", **fields).body) == {"input", "encoding_format"}


@pytest.mark.parametrize("name", ["truncate", "truncation"])
def test_the_fields_of_other_services_for_long_texts_override_the_server(name: str) -> None:
    texts = " ".join(["a"] * (RULES.max_model_len + 1))
    for value in (True, "END"):
        assert ask(input=texts, **{name: value}).body["truncate_prompt_tokens"] == RULES.max_model_len
        assert ask(input=texts, truncate_prompt_tokens=4, **{name: value}).body["truncate_prompt_tokens"] == 4
    for value in (False, "NONE"):
        assert "tokens" in refused(rules=replace(RULES, long_texts="truncate"), input=texts, **{name: value})
    for value in ("START", "end", 1, ["END"]):
        assert name in refused(input="a", **{name: value})
        assert name in refused(input="a", truncate_prompt_tokens=4, **{name: value})


def test_two_fields_for_long_texts_are_refused() -> None:
    assert "truncate or truncation" in refused(input="a", truncate=True, truncation=False)


def test_an_empty_prompt_name_overrides_the_default_prompt() -> None:
    rules = replace(RULES, default_prompt="query")
    assert ask(rules, input="a").inputs == [QUERY + "a"]
    assert ask(rules, input="a", prompt_name="").inputs == ["a"]


def test_a_byte_order_mark_is_accepted() -> None:
    raw = (CASES / "16-http-edges" / "bom.json").read_bytes()
    assert raw.startswith(codecs.BOM_UTF8)
    assert read(raw, RULES, words).inputs


def test_a_text_with_a_token_that_the_model_lacks_is_refused_with_its_index() -> None:
    def beyond(text: str) -> str | None:
        return "[CUST]" if "[CUST]" in text else None

    with pytest.raises(Refused, match=r"input\[1\] holds the token .*CUST") as caught:
        read(b'{"input": ["good", "to [CUST]"]}', RULES, words, beyond)
    assert caught.value.status == 400
    with pytest.raises(Refused, match="CUST"):
        read(b'{"input": "to [CUST]", "truncate_prompt_tokens": 2}', RULES, words, beyond)


def test_the_batch_size_is_limited() -> None:
    assert refused(input=list("abcd")) == "input has 4 texts; a request may have 3 (--max-client-batch)"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"input": NaN}',
        b'{"input": "\xff"}',
        b'{"input": "' + b"\xed\xa0\x80" + b'"}',
        b'{"input": "\\ud800"}',
        b'{"input": "x", "model": "\\udc00"}',
        b"[" * 100_000,
        b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"input": ' + b"9" * 10_000 + b"}",
        b"{}",
        b'{"input": null}',
        b'{"input": {}}',
        b'{"input": 5}',
        b'{"input": []}',
        b'{"input": [null]}',
        b'{"input": [{}]}',
        b'{"input": ["a", 5]}',
        b'{"input": [true]}',
        b'{"input": "x", "model": 5}',
        b'{"input": "x", "user": []}',
        b'{"input": "x", "encoding_format": "bytes"}',
        b'{"input": "x", "encoding_format": {}}',
        b'{"input": "x", "add_special_tokens": 1}',
        b'{"input": "x", "messages": []}',
    ],
)
def test_an_invalid_body_is_a_400(raw: bytes) -> None:
    assert refused(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"input": [' + b"[]," * 100_000 + b"[]]}", "100003 lists"),
        (b'{"input": [' + b"{}," * 100_000 + b"{}]}", "100003 lists"),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "100001 lists"),
        (b'{"input": [' + b'"",' * 100_000 + b'""]}', "100002 strings"),
        (b'{"input": [' + b"null," * 100_000 + b"null]}", "100000 values"),
        (b'{"input": [' + b"1, " * 100_000 + b"1]}", "--allow-token-ids"),
    ],
)
def test_too_many_values_are_refused_before_they_are_built(raw: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json.JSONDecoder, "decode", lambda *_: pytest.fail("parsed"))
    with pytest.raises(Refused, match=re.escape(message)) as caught:
        read(raw, RULES, words)
    assert caught.value.status == 400


def test_quotes_commas_and_brackets_inside_texts_are_not_values() -> None:
    for text in ('"' * 5000, "[" * 5000, "{" * 5000, "," * 5000, "\\" * 5001, '\\"' * 3000, '\\\\",' * 2000):
        assert ask(input=["a", text]).inputs == ["a", text]


def test_token_ids_may_be_as_many_as_the_model_takes() -> None:
    rules = replace(RULES, allow_token_ids=True, max_model_len=2000)
    assert len(ask(rules, input=[[1] * 2000] * 3).inputs) == 3


def test_a_very_long_name_is_shortened_in_the_message() -> None:
    for name, status in (("model", 404), ("user", 400), ("prompt_name", 400)):
        with pytest.raises(Refused) as caught:
            read(json.dumps({"input": "a", name: "ü" * 10**6}).encode(), RULES, words)
        assert caught.value.status == status
        assert caught.value.param == name
        assert len(caught.value.body()) < 1000
