"""The gate: an ASGI middleware in front of vLLM's own app, inside vLLM's process. vLLM's `--middleware` names `Gate` here."""

from qembed.serve.gate.gate import Gate

__all__ = ["Gate"]
