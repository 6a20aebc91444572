"""`qembed quantize` with settings that its command line does not offer: `run_settings.py --settings JSON [OPTION …]`."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from typing import Any

from qembed.cli import main
from qembed.quantize import settings as settings_module
from qembed.quantize.settings import Settings


def chosen(**options: Any) -> Settings:
    """Settings as the command line makes them, with ours in their place."""
    return replace(Settings(**options), **given)


if __name__ == "__main__":
    option, text, *rest = sys.argv[1:]
    assert option == "--settings", sys.argv
    given: dict[str, Any] = json.loads(text)
    if unknown := given.keys() - {field.name for field in fields(Settings)}:
        raise SystemExit(f"no such settings: {', '.join(sorted(unknown))}")
    settings_module.Settings = chosen  # type: ignore[assignment, misc]
    sys.argv[1:] = ["quantize", "--json", *rest]
    main()
