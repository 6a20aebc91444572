"""The fake server and the cache folder of tests/eval."""

from __future__ import annotations

from tests.eval.conftest import cache_folder, start_server

__all__ = ["cache_folder", "start_server"]
