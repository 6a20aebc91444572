"""The built-in data sets."""

from __future__ import annotations

from pathlib import Path


def test_the_built_in_sets_have_the_documented_sizes_and_languages() -> None:
    from qembed.eval.readers import builtin

    collection = builtin.retrieval()
    assert len(collection.queries) == 64
    assert {text.language for text in collection.queries} == {"en", "de", "es", "zh"}
    assert len(collection.passages) > 200
    assert all(len(grades) == 4 for grades in collection.relevant)
    for text, grades in zip(collection.queries, collection.relevant, strict=True):
        (exact_match,) = [row for row, grade in grades.items() if grade == 2]
        assert collection.passages[exact_match].language == text.language
    texts = [text.text for text in collection.passages]
    assert len(set(texts)) == len(texts)
    data = builtin.classification()
    assert len(data.labels) == len({text.text for text in data.texts}) == 192
    assert {data.labels.count(label) for label in data.labels} == {32}
    pairs = builtin.sts()
    assert len(pairs.scores) > 50
    assert min(pairs.scores) >= 0
    assert max(pairs.scores) <= 5
    assert Path(builtin.DATA, "retrieval", "qrels", "test.tsv").exists()
