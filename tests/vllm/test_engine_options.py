"""`--engine-arg`."""

from __future__ import annotations

import pytest

from qembed.errors import BadInput
from qembed.vllm.engine_options import option, parse


def test_settings_have_vllms_names() -> None:
    assert parse("max_log_len=5") == ("max-log-len", "5")
    assert parse("--max-log-len=a=b") == ("max-log-len", "a=b")
    assert parse("enable-request-id-headers") == ("enable-request-id-headers", "true")
    assert option("max-log-len", "5") == ["--max-log-len", "5"]
    assert option("x", "true") == ["--x"]
    assert option("x", "False") == ["--no-x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port=1", "use --port"),
        ("max_model_len=1", "use --max-model-len"),
        ("api-key=x", "use --api-key-file"),
        ("trust-remote-code=true", "never run"),
        ("no-trust-remote-code", "never run"),
        ("load_format=pt", "safetensors"),
        ("middleware=os.system", "not allowed"),
        ("hf-overrides.architectures+=X", "not allowed"),
        ("=5", "KEY=VALUE"),
        ("", "KEY=VALUE"),
    ],
)
def test_settings_with_an_own_option_and_forbidden_ones_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse(text)
