"""Causes of failures and stages, read from vLLM's log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qembed.vllm import log

FAILED = """\
(EngineCore pid=7) ERROR 11-23 01:46:13 [core.py:1100] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-23 01:46:13 [core.py:1100] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-23 01:46:13 [core.py:1100]   File "loader.py", line 3, in load
(EngineCore pid=7) ERROR 11-23 01:46:13 [core.py:1100] ValueError: no such weight: layers.0
(APIServer pid=5) Traceback (most recent call last):
(APIServer pid=5)   File "api.py", line 1, in main
(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_is_the_exception_of_the_failed_process_not_of_its_parent() -> None:
    assert log.cause(FAILED.splitlines()) == "ValueError: no such weight: layers.0"


def test_a_refused_options_cause_is_the_reason() -> None:
    lines = [
        "(APIServer pid=5) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "(APIServer pid=5)   Value error, Unknown quantization method: qembed_awq. Must be one of ['awq']. [type=value_error]",
        "(APIServer pid=5)     For further information visit https://errors.pydantic.dev/2.14/v/value_error",
    ]
    assert log.cause(lines) == "Unknown quantization method: qembed_awq"
    assert log.cause([lines[0], "  Value error, too long"]) == "too long"


def test_exceptions_with_a_module_and_in_colour_are_recognized() -> None:
    assert log.cause(["\x1b[31mtorch.cuda.OutOfMemoryError: 2 GiB\x1b[0m"]) == "torch.cuda.OutOfMemoryError: 2 GiB"


def test_a_log_without_an_exception_has_no_cause() -> None:
    assert log.cause(["INFO 11-23 01:46:13 [a.py:1] Error: handled", "bye"]) is None


def test_stages_are_recognized_by_their_first_line() -> None:
    assert (
        log.stage("(EngineCore pid=1) INFO 1-1 1:1:1 [core.py:1] Initializing a V1 LLM engine (v1) with")
        == "starting the engine"
    )
    assert log.stage("anything else") is None


def test_new_lines_are_complete_and_returned_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as writer:
        reader = log.Log(path)
        writer.write("one\ntw")
        writer.flush()
        assert reader.new_lines() == ["one"]
        writer.write("o\n")
        writer.flush()
        assert reader.new_lines() == ["two"]
        assert reader.new_lines() == []
        reader.close()


@pytest.mark.parametrize("style", ["text", "json"])
def test_no_control_character_reaches_the_terminal(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b[2Jb\x9b31mc\u202ed\u2066e\x07f\u2028g\U000e0041h\x7fi\tü 語\u3000\x85"
    log.show(text, style)
    log.event(text, text=text)
    log.access(json.dumps({"path": text}), style)
    lines = capsys.readouterr().err
    assert not [sign for sign in lines if not sign.isprintable() and sign not in "\t\n\u3000"]
    assert "\\u009b" in lines
    assert "\\u202e" in lines
    assert "ü 語" in lines
    event = next(json.loads(line) for line in lines.splitlines() if '"text"' in line)
    assert event["text"] == text


@pytest.mark.parametrize("process", ["", "(APIServer pid=8626) "])
def test_the_gates_own_lines_are_known_behind_the_name_of_a_process(process: str) -> None:
    line = 'qembed-access {"request_id": "1"}'
    assert log.own(process + line) == line
    assert log.own(f"{process}INFO 11-28 03:37:16 [launcher.py:114] qembed-access") is None
