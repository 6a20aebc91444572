"""Small data sets in four languages, written for qembed and shipped with it, so that all tasks run offline."""

from __future__ import annotations

from dataclasses import replace

from qembed.eval import texts
from qembed.eval.readers import beir, tables
from qembed.eval.tasks.classification import Labelled
from qembed.eval.tasks.retrieval import Collection
from qembed.eval.tasks.sts import Pairs
from qembed.files import sha256

DATA = texts.HELDOUT.parent
NAME = "built-in"


def retrieval(instruction: str | None = None) -> Collection:
    """Sixteen everyday subjects in four languages; each passage answers its question in every language.

    The held-out documents are passages too, relevant to nothing, as distractors.
    """
    own = beir.read(DATA / "retrieval", instruction)
    others = [text for text in texts.read(texts.HELDOUT).texts if text.kind == "document"]
    digest = sha256(DATA / "retrieval" / "corpus.jsonl", DATA / "retrieval" / "queries.jsonl", texts.HELDOUT)
    return replace(own, name=NAME, sha256=digest, passages=[*own.passages, *others])


def classification(instruction: str | None = None) -> Labelled:
    """Customers' messages to a shop, in six classes."""
    return replace(tables.labelled(str(DATA / "classification.csv"), instruction), name=NAME)


def sts(instruction: str | None = None) -> Pairs:
    """Sentence pairs with scores from 0 (different subjects) to 5 (same meaning)."""
    return replace(tables.pairs(str(DATA / "sts.csv"), instruction), name=NAME)
