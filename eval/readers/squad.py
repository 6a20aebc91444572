"""Reads SQuAD's JSON, the format of each language of XQuAD: questions are queries, their paragraphs passages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qembed.checkpoint.files import read_json
from qembed.errors import BadInput
from qembed.eval.readers import files
from qembed.eval.tasks.retrieval import Collection
from qembed.files import sha256
from qembed.text.texts import Text

LARGEST = 2**30
"""Bytes of a file."""


def read(paths: Sequence[Path], instruction: str | None = None) -> Collection:
    """The collection of all `paths`, each in the language that its name gives ("xquad.de.json").

    A question's paragraph is relevant, and so is the paragraph of the question with the same id in the other files.

    Raises:
        BadInput: a file cannot be read, has another format, or holds no questions.
    """
    passages: dict[tuple[str | None, str], int] = {}
    texts: list[Text] = []
    queries: list[tuple[str, Text]] = []
    answers: dict[str, list[int]] = {}
    for path in paths:
        language = language_of(path)
        before = len(queries)
        for where, context, questions in _paragraphs(path):
            row = passages.setdefault((language, context), len(texts))
            if row == len(texts):
                texts.append(Text(f"{path.stem} {row + 1}", context, "document", language))
            for question_id, question in questions:
                if row not in answers.setdefault(question_id, []):
                    answers[question_id].append(row)
                query_id = f"{question_id} ({language})" if language else question_id
                queries.append(
                    (question_id, Text(query_id, files.text(question, where, "a question"), "query", language, instruction))
                )
        if len(queries) == before:
            raise BadInput(f"{path}: holds no questions")
    name = paths[0].name if len(paths) == 1 else paths[0].parent.name
    relevant = [dict.fromkeys(answers[question_id], 1) for question_id, _ in queries]
    return Collection(name, sha256(*paths), [text for _, text in queries], texts, relevant)


def language_of(path: Path) -> str | None:
    """The language in a file's name: "xquad.de.json" gives "de"."""
    match = re.search(r"[._-]([a-z]{2,3})(?:[_-][A-Za-z]+)?\.json$", path.name)
    return match[1] if match else None


def _paragraphs(path: Path) -> list[tuple[str, str, list[tuple[str, Any]]]]:
    """Location, paragraph, and its questions' ids and texts."""
    paragraphs = []
    try:
        for number, article in enumerate(read_json(path, largest=LARGEST)["data"], 1):
            for place, paragraph in enumerate(article["paragraphs"], 1):
                where = f"{path}, article {number}, paragraph {place}"
                questions = [(str(question["id"]), question["question"]) for question in paragraph["qas"]]
                paragraphs.append((where, files.text(paragraph["context"], where, "the context"), questions))
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path}: not SQuAD's JSON (data, paragraphs, context, qas): {error} is missing or of another kind"
        ) from error
    return paragraphs
