"""The sample checkpoint: a small trained model in the layout of Qwen/Qwen3-Embedding-0.6B. See README.md beside this file."""

from pathlib import Path

FOLDER = Path(__file__).parent / "checkpoint"
