"""Texts to vectors: on a stand-in for the engine, which is quick; the real one is in tests/e2e/test_embed.py."""
