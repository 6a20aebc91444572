"""The built-in texts keep their promises."""

from __future__ import annotations

import json
from importlib.resources import files

from qembed.eval import texts


def squeezed(text: str) -> str:
    return " ".join(text.casefold().split())


def test_held_out_texts_are_many_and_mixed() -> None:
    found = texts.read(texts.HELDOUT).texts
    assert len(found) >= 256
    assert len({text.language for text in found}) >= 10
    assert None not in {text.language for text in found}
    for kind in texts.KINDS:
        assert sum(text.kind == kind for text in found) >= 20
    assert any(text.kind == "query" and text.instruction for text in found)
    assert any(text.kind == "query" and not text.instruction for text in found)
    lengths = [len(text.text.split()) for text in found]
    assert min(lengths) <= 5
    assert max(lengths) >= 200


def test_no_text_or_id_comes_twice() -> None:
    found = texts.read(texts.HELDOUT).texts
    assert len({squeezed(text.text) for text in found}) == len(found)
    assert len({text.id for text in found}) == len(found)


def test_no_held_out_text_was_calibrated_on() -> None:
    calibration = files("qembed.quantize").joinpath("data/calibration.jsonl").read_text(encoding="utf-8")
    languages = {squeezed(json.loads(line)["text"]) for line in calibration.split("\n") if line.strip()}
    assert len(languages) >= 256
    assert not [text.id for text in texts.read(texts.HELDOUT).texts if squeezed(text.text) in languages]
