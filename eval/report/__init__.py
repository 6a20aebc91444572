"""The result of an evaluation for people: in a terminal, as Markdown, as one self-contained HTML page."""
