"""Evaluation results for people: in a terminal, as Markdown, as a self-contained HTML page."""
