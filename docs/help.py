"""Write docs/cli.md: the `--help` of `qembed` and of each of its commands.

    python docs/help.py            write the page
    python docs/help.py --check    write nothing; exit 1, naming the page, if it is out of date

Help texts are wrapped at 100 columns whatever the terminal, so every machine writes the same page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from qembed.cli import COMMANDS, group

PAGE = Path(__file__).with_name("cli.md")
COLUMNS = 100
INTRODUCTION = """\
# Command reference

The `--help` of `qembed` and of each command. `python docs/help.py` writes this page; `make lint` fails if it is out of date.
"""


def help_text(*command: str) -> str:
    """What `qembed COMMAND --help` prints."""
    width: dict[str, Any] = {"terminal_width": COLUMNS, "max_content_width": COLUMNS}
    result = CliRunner().invoke(group, [*command, "--help"], prog_name="qembed", catch_exceptions=False, **width)
    assert result.exit_code == 0, result.output
    return result.output


def page() -> str:
    """The text of docs/cli.md: a list of links, then a section for each command under the heading `qembed COMMAND`."""
    texts = {"qembed": help_text(), **{f"qembed {name}": help_text(name) for name in COMMANDS}}
    links = [f"- [{title}](#{title.replace(' ', '-')})" for title in texts]
    sections = [f"\n## {title}\n\n```\n{text.strip()}\n```" for title, text in texts.items()]
    return "\n".join([INTRODUCTION, *links, *sections, ""])


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or check it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="docs/help.py", description="Write docs/cli.md from the commands' --help.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    check = parser.parse_args(arguments).check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"docs/{PAGE.name} is out of date: run `python docs/help.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
