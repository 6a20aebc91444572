"""`qembed quantize`, for `tests.victims`: `python -m tests.quantize.victim`."""

from __future__ import annotations

from tests import victims

SHARD_BYTES = 70_000
"""Small enough that tiny checkpoints have several shards."""


def main() -> None:
    """Import everything once for all forked children, then answer requests."""
    import transformers
    from transformers import AutoConfig, AutoModel  # noqa: F401

    from qembed.quantize import parts, run, verify  # noqa: F401

    transformers.logging.set_verbosity_error()
    parts.SHARD_BYTES = SHARD_BYTES
    victims.answer()


if __name__ == "__main__":
    main()
