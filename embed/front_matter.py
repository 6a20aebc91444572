"""Front matter of Markdown files: metadata before the text, as YAML between `---` or TOML between `+++`."""

from __future__ import annotations

import re
import tomllib

FENCED = re.compile(r"(---(?![ \t]*\n[ \t]*\n)|\+\+\+)[ \t]*\n(.*?\n)??(\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
KEY = re.compile(r"(?:[^\s:#\-\[\]{}\"'][^:]*|\"[^\"]*\"|'[^']*')\s*:(?:\s|$)")
"""The beginning of an entry of a YAML mapping. A parser would refuse what authors write, such as `title: One: two`."""


def without(text: str) -> str:
    """`text` without its front matter, with line ends as LF.

    A first line `---` may also be a rule: then what follows is an empty line, as
    Pandoc has it, or no YAML mapping, and all of it stays.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    fenced = FENCED.match(text)
    if fenced is None or (fenced[3] == "..." and fenced[1] != "---"):
        return text
    is_metadata = _is_mapping if fenced[1] == "---" else _is_toml
    return text[fenced.end() :] if is_metadata(fenced[2] or "") else text


def _is_toml(body: str) -> bool:
    try:
        tomllib.loads(body)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _is_mapping(body: str) -> bool:
    """Whether the lines are a YAML mapping: comments, entries, and below entries their indented values."""
    entries, is_value = 0, False
    for line in body.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if KEY.match(line):
            entries, is_value = entries + 1, True
        elif not is_value or not (line[0] in " \t" or re.match(r"- |-$|[\]}\"']", line)):
            return False
    return entries > 0 or not body.strip()
