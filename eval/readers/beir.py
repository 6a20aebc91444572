"""Reads BEIR's folder layout: corpus.jsonl, queries.jsonl, qrels/test.tsv (Thakur et al. 2021)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qembed.errors import BadInput
from qembed.eval.readers import files
from qembed.eval.tasks.retrieval import Collection
from qembed.eval.texts import lines
from qembed.files import sha256
from qembed.text.cleaning import clean
from qembed.text.display import counted
from qembed.text.texts import Text

SPLITS = ("test", "dev", "validation", "train")


def is_here(path: Path) -> bool:
    """Whether `path` looks like a BEIR folder."""
    return (path / "corpus.jsonl").exists()


def read(folder: Path, instruction: str | None = None) -> Collection:
    """The collection in `folder`, with the qrels of the split `test`, or else the first existing one of SPLITS.

    `corpus.jsonl` has objects with `_id`, `text` and optionally `title`, which is put before the text; `queries.jsonl`
    likewise. Both may have a `language` (or `lang`), at the top level or under `metadata`. Public sets have judgements of
    queries and passages that are not there, and passages with neither title nor text: these are left out, and so are queries
    without a relevant passage. Notes count what is left out, but for queries that the split does not judge.

    Raises:
        BadInput: a file is missing, empty or malformed, or nothing is left of the judgements.
    """
    corpus_file, queries_file, qrels_file = folder / "corpus.jsonl", folder / "queries.jsonl", _qrels(folder)
    passages, blank = _texts(corpus_file, "document", None)
    queries, _ = _texts(queries_file, "query", instruction)
    passage_rows = {text.id: row for row, text in enumerate(passages)}
    judged: dict[str, dict[int, int]] = {text.id: {} for text in queries}
    left_out: Counter[str] = Counter()
    judgements = _judgements(qrels_file)
    for query, passage, grade in judgements:
        if query not in judged:
            left_out[f"queries that are not in {queries_file.name}"] += 1
        elif passage in blank:
            left_out["passages without title and text"] += 1
        elif passage not in passage_rows:
            left_out[f"passages that are not in {corpus_file.name}"] += 1
        else:
            row = passage_rows[passage]
            if judged[query].get(row, grade) != grade:
                left_out["a passage that has another grade for the same query further down"] += 1
            judged[query][row] = grade
    relevant = {query: {row: grade for row, grade in grades.items() if grade > 0} for query, grades in judged.items()}
    answered = [text for text in queries if relevant[text.id]]
    notes = [f"left out: {counted(count, 'judgement')} of {what}" for what, count in left_out.items()]
    if not answered:
        raise BadInput(f"{qrels_file}: names no relevant passage for any query{''.join(f'; {note}' for note in notes)}")
    if blank:
        notes.append(f"left out: {counted(len(blank), 'passage')} without title and text")
    if unanswered := len({query for query, _, _ in judgements if query in judged} - {text.id for text in answered}):
        notes.append(f"left out: {counted(unanswered, 'judged query', 'judged queries')} without a relevant passage")
    digest = sha256(corpus_file, queries_file, qrels_file)
    return Collection(folder.name, digest, answered, passages, [relevant[text.id] for text in answered], tuple(notes))


def _qrels(folder: Path) -> Path:
    candidates = [folder / "qrels" / f"{split}.tsv" for split in SPLITS] + [folder / "qrels.tsv"]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise BadInput(f"{folder}: no qrels/test.tsv, which says which passages are relevant to which query")
    return path


def _texts(path: Path, kind: str, instruction: str | None) -> tuple[list[Text], set[str]]:
    """The texts, and the ids of documents without text."""
    texts: dict[str, Text] = {}
    blank: set[str] = set()
    for where, value in files.objects(path):
        text_id = files.text(value.get("_id", value.get("id")), where, "_id")
        title = value.get("title") if kind == "document" else None
        body = value.get("text")
        if isinstance(title, str) and title.strip():
            body = f"{title} {body}".strip() if isinstance(body, str) else title
        if text_id in texts or text_id in blank:
            raise BadInput(f"{where}: the _id {text_id!r} occurs twice")
        if kind == "document" and isinstance(body, str) and not clean(body).strip():
            blank.add(text_id)
            continue
        metadata: Any = value.get("metadata")
        language = files.language(value) or (files.language(metadata) if isinstance(metadata, dict) else None)
        texts[text_id] = Text(text_id, files.text(body, where, "text"), kind, language, instruction)
    if not texts:
        raise BadInput(f"{path}: holds no texts")
    return list(texts.values()), blank


def _judgements(path: Path) -> list[tuple[str, str, int]]:
    """Query id, passage id and grade of each line after the header."""
    judgements = []
    for line_number, line in lines(path):
        where = f"{path}, line {line_number}"
        cells = line.split("\t")
        if line_number == 1 and cells[-1].strip() in ("score", "relevance"):
            continue
        if len(cells) == 4:  # as TREC has it: query, iteration, passage, grade
            del cells[1]
        try:
            query, passage, grade = (cell.strip() for cell in cells)
            number = float(grade)
            judgements.append((query, passage, int(number)))
        except (ValueError, OverflowError) as error:
            raise BadInput(f"{where}: not query-id, corpus-id and score with tabs between") from error
        if not number.is_integer():
            raise BadInput(f"{where}: the score {grade} is no whole number; grades are 0, 1, 2, and so on")
    if not judgements:
        raise BadInput(f"{path}: holds no judgements")
    return judgements
