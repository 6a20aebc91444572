"""`qembed embed` with the fake engine, for `tests.victims`: `python -m tests.embed.victim`."""

from __future__ import annotations

from tests import victims
from tests.embed import fake_engine


def main() -> None:
    """Import everything once for all children, then answer."""
    import pyarrow.parquet  # noqa: F401

    from qembed.embed import cli, run  # noqa: F401

    fake_engine.install()
    victims.answer()


if __name__ == "__main__":
    main()
