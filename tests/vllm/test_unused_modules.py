"""Which modules count as missing while an engine is imported."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from qembed.vllm import unused_modules


def test_hidden_modules_count_as_missing_within_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with unused_modules.hidden(["wave", "json"]):
        assert find_spec("wave") is None
        with pytest.raises(ImportError):
            import wave
        assert find_spec("json") is not None  # imported already, as by the command itself
    import wave

    assert wave.open
    assert sys.modules["json"] is not None


def test_a_module_that_is_needed_is_not_hidden() -> None:
    assert {"ray", "grpc", "triton"} <= set(unused_modules.names([], on_cpu=True))
    assert "triton" not in unused_modules.names([], on_cpu=False)
    traced = unused_modules.names(["--otlp-traces-endpoint=http://collector:4317"], on_cpu=True)
    assert not {"grpc", "opentelemetry"} & set(traced)
