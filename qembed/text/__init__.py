"""Texts on their way to a model: prompts and cleaning."""
