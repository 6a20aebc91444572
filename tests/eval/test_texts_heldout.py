"""The built-in held-out texts: their number, variety, and separation from the calibration texts."""

from __future__ import annotations

import json
from importlib.resources import files

from qembed.eval import texts


def normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def test_held_out_texts_are_of_many_languages_kinds_and_lengths() -> None:
    heldout = texts.read(texts.HELDOUT).texts
    assert len(heldout) >= 256
    assert len({text.language for text in heldout}) >= 10
    assert None not in {text.language for text in heldout}
    for kind in texts.KINDS:
        assert sum(text.kind == kind for text in heldout) >= 20
    assert any(text.kind == "query" and text.instruction for text in heldout)
    assert any(text.kind == "query" and not text.instruction for text in heldout)
    lengths = [len(text.text.split()) for text in heldout]
    assert min(lengths) <= 5
    assert max(lengths) >= 200


def test_texts_and_ids_are_unique() -> None:
    heldout = texts.read(texts.HELDOUT).texts
    assert len({normalized(text.text) for text in heldout}) == len(heldout)
    assert len({text.id for text in heldout}) == len(heldout)


def test_no_held_out_text_is_a_calibration_text() -> None:
    calibration = files("qembed.quantize").joinpath("data/calibration.jsonl").read_text(encoding="utf-8")
    calibration_texts = {normalized(json.loads(line)["text"]) for line in calibration.split("\n") if line.strip()}
    assert len(calibration_texts) >= 256
    assert not [text.id for text in texts.read(texts.HELDOUT).texts if normalized(text.text) in calibration_texts]
