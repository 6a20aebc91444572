"""The checkpoints and servers that the tests of eval have."""

from __future__ import annotations

from tests.eval.conftest import cache_folder, fp16, int4, start_server

__all__ = ["cache_folder", "fp16", "int4", "start_server"]
