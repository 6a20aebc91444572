"""`qembed embed` with a fake engine; tests/e2e/test_embed.py uses the real one."""
