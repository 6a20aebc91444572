"""Reads labelled texts and scored pairs from CSV, TSV, Parquet or JSONL.

A file is given as FILE, or as FILE:COLUMN,COLUMN… if its columns have other names than those known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from qembed.errors import BadInput
from qembed.eval.readers import files
from qembed.eval.tasks.classification import Labelled
from qembed.eval.tasks.sts import Pairs
from qembed.files import sha256
from qembed.text.display import counted
from qembed.text.rows.options import RowOptions
from qembed.text.rows.reader import DEFAULT
from qembed.text.texts import Text

TEXT = ("text", "sentence", "content", "utterance", "question")
LABEL = ("label", "category", "class", "intent")
FIRST = ("sentence1", "text1", "first")
SECOND = ("sentence2", "text2", "second")
SCORE = ("score", "similarity", "label")
TRAIN, TEST = ("train",), ("test", "validation", "dev")


def labelled(
    argument: str,
    instruction: str | None = None,
    options: RowOptions = DEFAULT,
    on_note: Callable[[str], None] = lambda _: None,
) -> Labelled:
    """The labelled texts of a file, or of a folder with `train` and `test` (CSV, TSV, Parquet or JSONL).

    In a file, a column `split` can assign rows to "train" or "test"; without it all rows are predicted by cross-validation.

    Raises:
        BadInput: a file cannot be read, has too few texts or lacks a column, or a row has no text or no label.
    """
    path, columns = _split(argument, 2)
    parts = [(_part(path, names), names is TEST) for names in (TRAIN, TEST)] if path.is_dir() else [(path, None)]
    texts: list[Text] = []
    labels: list[str] = []
    tests: list[bool | None] = []
    for file, is_test in parts:
        wanted = [*(columns or (*TEXT, *LABEL)), *files.LANGUAGE, *(("split",) if is_test is None else ())]
        for number, row in enumerate(files.rows(file, wanted, options, on_note), 1):
            text = files.column(row, columns[:1] or TEXT, "text")
            label = files.column(row, columns[1:] or LABEL, "label")
            texts.append(_text(f"{file.stem} {number}", text, row, instruction))
            labels.append(files.label(label, row.where, "the label"))
            tests.append(_is_test(row) if is_test is None else is_test)
    if len(texts) < 4:
        raise BadInput(f"{path}: {counted(len(texts), 'text')}; at least four are needed, two with each of two labels")
    if None in tests and any(test is not None for test in tests):
        raise BadInput(f"{path}: some rows name a split and some do not")
    split = None if None in tests else [bool(test) for test in tests]
    return Labelled(path.name, sha256(*(file for file, _ in parts)), texts, labels, split)


def pairs(
    argument: str,
    instruction: str | None = None,
    options: RowOptions = DEFAULT,
    on_note: Callable[[str], None] = lambda _: None,
) -> Pairs:
    """The scored pairs of a file.

    Raises:
        BadInput: it cannot be read, is empty or lacks a column, or a row lacks a text or has a score that is not a number.
    """
    path, columns = _split(argument, 3)
    first: list[Text] = []
    second: list[Text] = []
    scores: list[float] = []
    wanted = [*(columns or (*FIRST, *SECOND, *SCORE)), *files.LANGUAGE]
    for number, row in enumerate(files.rows(path, wanted, options, on_note), 1):
        for texts, names, chosen, what in (
            (first, FIRST, columns[0:1], "first text"),
            (second, SECOND, columns[1:2], "second text"),
        ):
            texts.append(_text(f"{path.stem} {number}", files.column(row, chosen or names, what), row, instruction))
        cell = files.column(row, columns[2:3] or SCORE, "score")
        score = files.number(cell, row)
        if not math.isfinite(score):
            raise BadInput(f"{row.where}: the score {cell!r} is not a number")
        scores.append(score)
    if not scores:
        raise BadInput(f"{path}: holds no pairs")
    return Pairs(path.name, sha256(path), first, second, scores)


def path_of(argument: str) -> Path:
    """The path in FILE or FILE:COLUMN,COLUMN…"""
    return Path(argument) if Path(argument).exists() or ":" not in argument else Path(argument.rpartition(":")[0])


def _split(argument: str, most: int) -> tuple[Path, Sequence[str]]:
    """The path, and the column names after it."""
    if Path(argument).exists() or ":" not in argument:
        path = Path(argument)
        if not path.exists():
            raise BadInput(f"{argument}: no such file")
        return path, ()
    name, _, column_list = argument.rpartition(":")
    columns = [column.strip() for column in column_list.split(",")]
    if not Path(name).exists():
        raise BadInput(f"{name}: no such file")
    if len(columns) != most or not all(columns):
        raise BadInput(f"{argument}: name {most} columns after the colon, with commas between")
    return Path(name), columns


def _part(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        for kind in files.KINDS:
            if (path := folder / f"{name}{kind}").exists():
                return path
    raise BadInput(f"{folder}: no {names[0]}.csv, .tsv, .jsonl or .parquet; a folder of labelled texts holds train and test")


def _text(name: str, cell: object, row: files.TableRow, instruction: str | None) -> Text:
    kind = "document" if instruction is None else "query"
    return Text(name, files.text(cell, row.where, "the text"), kind, files.language(row.values), instruction)


def _is_test(row: files.TableRow) -> bool | None:
    split = row.values.get("split")
    if split is None or split == "":
        return None
    if split in TRAIN:
        return False
    if split in TEST:
        return True
    raise BadInput(f"{row.where}: the split {split!r} is none of {', '.join((*TRAIN, *TEST))}")
